"""The batch job on real Ray: the contract's rows, exactly once, however often it is killed."""

from __future__ import annotations

import csv
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from serving import batch, codec
from serving.ledger import Ledger
from serving.rows import SCHEMA
from tests.serving.reading import read_parts, read_scores


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


def score(engine: Path, source: Path | str, output: Path, *flags: str) -> None:
    batch.main(["--engine", str(engine), "--input", str(source), "--output", str(output), "--batch-size", "8", *flags])


def test_every_sample_has_the_outcome_that_its_list_states(bundle: Path, shared_dir: Path, tmp_path: Path) -> None:
    source = shared_dir / "data" / "sample_images"
    score(bundle, source, tmp_path / "out")
    rows = {row["uri"]: row for row in read_scores(tmp_path / "out").to_pylist()}
    stated = list(csv.DictReader((source / "manifest.csv").open(encoding="utf-8")))
    assert set(rows) == {str(source / entry["file"]) for entry in stated}
    for entry in stated:
        row = rows[str(source / entry["file"])]
        expected = entry["expected"]
        if expected.startswith("error"):
            kind = expected.split()[1] if len(expected.split()) > 1 else "undecodable"
            assert row["error"].startswith(f"{kind}: "), entry["file"]
            assert all(row[name] is None for name in SCHEMA.names[3:-1])
        elif not expected.startswith("either"):
            assert row["status"] == "ok", (entry["file"], row["error"])
            size = (int(entry["w"]), int(entry["h"]))
            turned = entry["exif_orientation"] in ("5", "6", "7", "8")
            assert (row["width"], row["height"]) == (size[::-1] if turned else size)
        if row["status"] == "ok":
            assert codec.stored(row).shape == (row["mask_height"], row["mask_width"]) == (16, 16)
            assert row["view"] == [0, 0, row["width"], row["height"]]
            assert row["box"] == (None if codec.box(row) is None else pytest.approx(codec.box(row)))
            assert np.isfinite([row["score"], row["area"]]).all()


def command(engine: Path, source: Path, output: Path) -> list[str]:
    flags = [
        "--engine",
        str(engine),
        "--input",
        str(source),
        "--output",
        str(output),
        "--batch-size",
        "8",
        "--workers",
        "1",
    ]
    return [sys.executable, "-m", "serving.batch", *flags, "--cpus-per-worker", "1", "--shard-size", "8"]


def test_a_killed_job_goes_on_where_it_was(
    bundle: Path, images: Path, tmp_path: Path, score_here: Callable[..., pa.Table]
) -> None:
    output, whole = tmp_path / "out", tmp_path / "whole"
    killed = 0
    for wanted in (1, 6):
        job = subprocess.Popen(command(bundle, images, output), start_new_session=True, stderr=subprocess.DEVNULL)
        deadline = time.time() + 100
        while len(read_parts(output)) < wanted and job.poll() is None and time.time() < deadline:
            time.sleep(0.02)
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)  # driver, workers and Ray itself
            killed += 1
        job.wait()
    assert killed == 2
    done = read_parts(output)
    score(bundle, images, output, "--shard-size", "8")
    assert sorted(read_scores(output)["uri"].to_pylist()) == sorted(map(str, images.iterdir()))
    assert set(done.items()) <= set(read_parts(output).items())
    score_here(bundle, images, whole, shard_size=8)
    assert read_parts(output) == read_parts(whole)
    states = [job.seen_state for job in Ledger(str(output)).jobs()]
    assert states == ["dead", "dead", "done"]


def test_two_jobs_on_one_output_do_no_harm(bundle: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    second = subprocess.Popen(command(bundle, images, output), stderr=subprocess.DEVNULL)
    score(bundle, images, output, "--shard-size", "8")
    first = read_scores(output)
    assert second.wait(timeout=100) == 0
    assert sorted(first["uri"].to_pylist()) == sorted(map(str, images.iterdir()))
    assert read_scores(output).equals(first)


def test_workers_that_do_not_fit_are_an_error_and_not_a_wait(bundle: Path, images: Path, tmp_path: Path) -> None:
    from pipeline.errors import UsageError

    with pytest.raises(UsageError, match="do not fit: the cluster has 2 CPUs"):
        score(bundle, images, tmp_path / "out", "--workers", "3", "--cpus-per-worker", "1")
    with pytest.raises(UsageError, match="no worker of 5 CPUs fits"):
        score(bundle, images, tmp_path / "out", "--cpus-per-worker", "5")
