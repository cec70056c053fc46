"""A picture that kills its decoder costs a row and not the job."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.decode import ImageError
from pipeline.errors import WorkError
from serving import watchdog
from serving.attempts import CAREFUL_AFTER, GIVE_UP_AFTER, attempt
from serving.careful import CarefulDecoder
from serving.decoder import Decoder, DecoderConfig
from serving.ledger import Ledger
from serving.sources import Source

CONFIG = DecoderConfig(size=32, geometry="squash")


def test_the_pictures_are_the_same_elsewhere_and_errors_too(jpeg: Callable[[int], bytes]) -> None:
    found = [(k, Source(str(k), lambda data=data: data)) for k, data in enumerate([jpeg(0), b"no image", jpeg(1)])]
    decoder = Decoder(CONFIG)
    here, there = list(decoder.decode(found)), list(decoder.decode(found, careful=True))
    assert here[1] == there[1]
    for k in (0, 2):
        assert np.array_equal(here[k].seen.pixels, there[k].seen.pixels)
        assert (here[k].seen.view, here[k].seen.width) == (there[k].seen.view, there[k].seen.width)


def test_a_death_is_an_error_row_and_the_next_picture_is_fine(jpeg: Callable[[int], bytes]) -> None:
    decoder = CarefulDecoder(DecoderConfig(size=32, geometry="squash"))
    before = decoder.see(jpeg(0))
    os.kill(decoder._process.pid, signal.SIGKILL)
    with pytest.raises(ImageError, match=r"^undecodable: the decoder died of it"):
        decoder.see(jpeg(0))
    assert np.array_equal(decoder.see(jpeg(0)).pixels, before.pixels)
    decoder.close()


def test_a_picture_that_never_ends(jpeg: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = CarefulDecoder(DecoderConfig(size=32, geometry="squash"))
    decoder.see(jpeg(0))
    monkeypatch.setattr(watchdog, "SECONDS", 0.5)
    os.kill(decoder._process.pid, signal.SIGSTOP)
    with pytest.raises(ImageError, match=r"^undecodable: not decoded in"):
        decoder.see(jpeg(0))
    assert decoder._process is None


def test_a_worker_whose_decoder_never_returns_dies_and_leaves_its_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "SECONDS", 0.5)
    monkeypatch.setattr(Decoder, "see", lambda _self, _data: time.sleep(1000))
    ledger = Ledger(str(tmp_path / "out"))

    def work() -> None:
        with attempt(ledger, "run", "key") as careful_now:
            list(Decoder(CONFIG).decode([(0, Source("0", lambda: b"x"))], careful=careful_now))

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    worker.join(20)
    assert worker.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "out" / "_ledger" / "tmp").glob("attempt-run-key-*"))) == 1


def test_marks_are_of_one_run_and_one_shard(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "out"))
    marks = tmp_path / "out" / "_ledger" / "tmp"

    def dies(job: str, key: str) -> bool:
        with attempt(ledger, job, key) as careful_now:
            left = {path.name: path.read_bytes() for path in marks.iterdir()}
        for name, data in left.items():  # as if the worker had not come to take them away
            (marks / name).write_bytes(data)
        return careful_now

    assert [dies("run", "key") for _ in range(GIVE_UP_AFTER)] == [k >= CAREFUL_AFTER for k in range(GIVE_UP_AFTER)]
    with pytest.raises(WorkError, match="has killed its worker 8 times"):
        dies("run", "key")
    assert dies("run", "other") is False
    assert dies("another run", "key") is False
    with attempt(ledger, "third", "key"):
        assert list(marks.glob("attempt-third-*"))
    assert not list(marks.glob("attempt-third-*"))
