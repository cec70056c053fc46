"""What a job decides: what is left, what is another version, what is refused.  Scored in this process, without Ray."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import store
from pipeline.errors import UsageError
from serving import batch, codec, part, scorer
from serving.inputs import Inputs
from serving.job import BatchRequest, prepare, run_job
from serving.ledger import JobRecord, Ledger
from tests.serving.reading import read_parts, read_scores

Score = Callable[..., pa.Table]


@pytest.fixture(scope="module")
def scored(bundle: Path, images: Path, score_here: Score, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("scored") / "scores"
    assert score_here(bundle, images, output).num_rows == 150
    return output


def test_running_again_does_nothing_and_a_new_image_little(
    bundle: Path, images: Path, score_here: Score, tmp_path: Path
) -> None:
    shutil.copytree(images, tmp_path / "in")
    first = score_here(bundle, tmp_path / "in", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert score_here(bundle, tmp_path / "in", tmp_path / "out", expected=0).equals(first)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")} == before
    shutil.copy(images / "00007.jpg", tmp_path / "in" / "00007b.jpg")
    (tmp_path / "in" / "00100.jpg").unlink()
    again = score_here(bundle, tmp_path / "in", tmp_path / "out")
    assert sorted(again["uri"].to_pylist()) == sorted(str(path) for path in (tmp_path / "in").iterdir())
    kept = set(before) & set((tmp_path / "out").glob("*.parquet"))
    assert 0 < len(kept) < len(before)


def test_another_engine_is_another_version_and_never_a_mix(
    bundle: Path, other_bundle: Path, images: Path, score_here: Score, tmp_path: Path
) -> None:
    first = score_here(bundle, images, tmp_path / "out")
    mine = read_parts(tmp_path / "out")
    second = score_here(other_bundle, images, tmp_path / "out")
    assert second["uri"].equals(first["uri"])
    assert len(set(second["engine"].to_pylist())) == 1
    assert set(second["engine"].to_pylist()) != set(first["engine"].to_pylist())
    aside = list((tmp_path / "out" / "_versions").rglob("*.parquet"))
    assert {path.name: path.read_bytes() for path in aside} == mine
    score_here(bundle, images, tmp_path / "out", expected=0)  # back to the first engine: its rows are still there
    assert read_parts(tmp_path / "out") == mine


def test_failed_rows_can_be_tried_again(
    bundle: Path, jpeg: Callable[[int], bytes], score_here: Score, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for k in range(3):
        (source / f"{k}.jpg").write_bytes(jpeg(k))
    (source / "3.jpg").write_bytes(b"never an image")
    # A file whose bytes are bad for a while: neither its size nor its time tell.
    good, stamp = (source / "1.jpg").read_bytes(), (source / "1.jpg").stat().st_mtime_ns
    for content in (bytes(len(good)), good):
        (source / "1.jpg").write_bytes(content)
        os.utime(source / "1.jpg", ns=(stamp, stamp))
        if content != good:
            before = score_here(bundle, source, tmp_path / "out").to_pylist()
    assert [row["status"] for row in before] == ["ok", "error", "ok", "error"]
    assert score_here(bundle, source, tmp_path / "out").to_pylist() == before
    after = score_here(bundle, source, tmp_path / "out", retry_errors=True).to_pylist()
    assert [row["status"] for row in after] == ["ok", "ok", "ok", "error"]
    assert [after[k] for k in (0, 2, 3)] == [before[k] for k in (0, 2, 3)]


def test_errors_of_a_version_come_back_with_it(
    bundle: Path, other_bundle: Path, jpeg: Callable[..., bytes], score_here: Score, tmp_path: Path
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "0.jpg").write_bytes(jpeg(0))
    (source / "1.jpg").write_bytes(b"never an image")
    first = score_here(bundle, source, output)
    score_here(other_bundle, source, output)
    assert score_here(bundle, source, output, expected=0).equals(first)
    errors = [[row["uri"] for row in job.error_rows] for job in Ledger(str(output)).jobs()]
    assert errors == [[f"{source}/1.jpg"]] * 3


def test_an_archive_that_can_be_read_again_is_scored_again(
    bundle: Path, images: Path, score_here: Score, tmp_path: Path
) -> None:
    archive, output = tmp_path / "x.tar", tmp_path / "out"
    with tarfile.open(archive, "w") as file:
        for name in ("00001.jpg", "00002.jpg", "00003.jpg"):
            file.add(images / name, name)
    good, stamp = archive.read_bytes(), archive.stat().st_mtime_ns
    for content in (good[:700] + bytes(len(good) - 700), good):
        archive.write_bytes(content)
        os.utime(archive, ns=(stamp, stamp))
        if content != good:
            before = score_here(bundle, archive, output).to_pylist()
    assert [row["status"] for row in before][-1] == "error" and len(before) < 4
    after = score_here(bundle, archive, output, retry_errors=True)
    assert after["status"].to_pylist() == ["ok"] * 3
    record = Ledger(str(output)).jobs()[-1]
    assert (record.done, record.total, record.errors) == (3, 3, 0)


def test_a_large_shard_is_written_in_groups_and_counted_from_its_end(
    bundle: Path, images: Path, scored: Path, score_here: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "x.tar", tmp_path / "out"
    (tmp_path / "bad.jpg").write_bytes(b"never an image")
    with tarfile.open(source, "w") as archive:
        for path in (*sorted(images.iterdir())[:40], tmp_path / "bad.jpg", *sorted(images.iterdir())[40:60]):
            archive.add(path, path.name)
    whole = score_here(bundle, source, tmp_path / "whole").to_pylist()
    for module in (scorer, part):
        monkeypatch.setattr(module, "GROUP_ROWS", 16)
    monkeypatch.setattr(part, "FOOTER_BYTES", 100)
    assert score_here(bundle, source, output).to_pylist() == whole
    (file,) = output.glob("*.parquet")
    sizes = pq.ParquetFile(file).metadata
    assert [sizes.row_group(k).num_rows for k in range(sizes.num_row_groups)] == [16, 16, 17, 12]
    assert part.read_counts(str(file)) == (61, 1)
    assert score_here(bundle, source, output, expected=1, retry_errors=True).to_pylist() == whole


def test_an_unfinished_output_goes_on_without_a_look_at_the_input(
    bundle: Path, images: Path, score_here: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(images, source)
    score_here(bundle, source, output, shard_size=16)
    parts = read_parts(output)
    lost = sorted(output.glob("*.parquet"))[3]
    names = set(pq.read_table(lost)["uri"].to_pylist())
    lost.unlink()
    shutil.copy(source / "00007.jpg", source / "another.jpg")
    read, entries = store.read_bytes, Inputs.entries
    looked_at: list[str] = []
    monkeypatch.setattr(store, "read_bytes", lambda place, **more: looked_at.append(place) or read(place, **more))
    monkeypatch.setattr(Inputs, "entries", lambda inputs: looked_at.append("the listing") or entries(inputs))
    after = score_here(bundle, source, output, expected=1)
    looked_at = [place for place in looked_at if place == "the listing" or place.endswith(".jpg")]
    first, then = looked_at[: len(names)], looked_at[len(names) :]
    assert set(first) == names, "only what is missing is read, and nothing is listed"
    assert then[0] == "the listing" and str(source / "another.jpg") in then and len(then) < 50
    assert sorted(after["uri"].to_pylist()) == sorted(map(str, source.iterdir()))
    assert len(set(read_parts(output).items()) & set(parts.items())) >= len(parts) - 2
    assert [job.done for job in Ledger(str(output)).jobs()] == [150, 151]


def test_an_unfinished_output_is_planned_anew_when_asked_or_when_it_is_another(
    bundle: Path, other_bundle: Path, images: Path, score_here: Score, tmp_path: Path
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(images, source)
    score_here(bundle, source, output, shard_size=16)
    shutil.copy(source / "00007.jpg", source / "another.jpg")

    def planned(engine: Path = bundle, **request) -> int | None:
        asked = {"engine": str(engine), "input": str(source), "output": str(output)} | request
        return prepare(BatchRequest(**asked), dry=True).plan.rows

    assert planned() == 151
    assert planned(retry_errors=True) == 150, "only what failed"
    sorted(output.glob("*.parquet"))[3].unlink()
    assert planned() == 150
    assert planned(new_plan=True) == planned(other_bundle) == planned(max_pixels=10**6) == planned(shard_size=32) == 151
    shutil.rmtree(source)
    with pytest.raises(UsageError, match="no such file or folder"):
        planned()


def test_a_job_that_began_while_this_one_was_planned_is_not_mixed_with(
    bundle: Path, other_bundle: Path, images: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "out")
    ours = prepare(BatchRequest(engine=str(bundle), input=str(images), output=output))
    theirs = prepare(BatchRequest(engine=str(other_bundle), input=str(images), output=output))
    theirs.ledger.write_job(JobRecord(id="theirs", state="running", version=theirs.version.id))
    with pytest.raises(UsageError, match=r"job theirs .* is writing version"):
        run_job(ours, score=lambda *_: iter(()))
    assert ours.ledger.current() is None, "nothing has been made current"


def test_large_jpegs_can_be_decoded_at_a_smaller_size(
    bundle: Path, jpeg: Callable[..., bytes], score_here: Score, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "large.jpg").write_bytes(jpeg(1, width=700, height=500))
    (source / "small.jpg").write_bytes(jpeg(2, width=100, height=90))
    (source / "not.jpg").write_bytes(b"never an image")
    exact = score_here(bundle, source, tmp_path / "exact").to_pylist()
    draft = score_here(bundle, source, tmp_path / "draft", draft=True).to_pylist()
    assert draft[2] == exact[2] and draft[1]["error"] == exact[1]["error"]
    large, other = exact[0], draft[0]
    assert (other["width"], other["height"]) == (700, 500) and other["label"] == large["label"]
    assert 0 < abs(other["score"] - large["score"]) < 0.05
    assert np.abs(codec.load(other).astype(float) - codec.load(large)).mean() < 0.05


def test_decoding_elsewhere_has_bounded_messages(bundle: Path, images: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(images / "00007.jpg", "a.jpg")

    def asked(source: Path, **more) -> BatchRequest:
        return BatchRequest(engine=str(bundle), input=str(source), output=str(tmp_path / "out"), decode_cpus=1, **more)

    with pytest.raises(UsageError, match="a tar file is decoded where it is scored"):
        prepare(asked(tmp_path / "x.tar"), dry=True)
    with pytest.raises(UsageError, match="shards of 2048 images; give --shard-size 256"):
        prepare(asked(images, shard_size=2048), dry=True)
    assert prepare(asked(images), dry=True).version.settings["shard_size"] <= 256


def test_what_is_wrong_is_said_on_one_line(bundle: Path, images: Path, scored: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "other.parquet").write_text("x")
    cases = [
        (["--input", str(images)], "--engine is missing"),
        (["--engine", "no.onnx", "--input", str(images)], "no such file or bundle"),
        (["--engine", str(bundle), "--input", "no/where"], "no such file or folder"),
        (["--engine", str(bundle), "--input", str(tmp_path / "empty")], "no images"),
        (["--engine", str(bundle), "--input", str(images), "--workers", "0"], "--workers"),
        (["--engine", str(bundle), "--input", str(images), "--work", "1"], "--work"),
        (["--engine", str(bundle), "--input", "x" * 300], "File name too long"),
        (["--engine", str(bundle), "--input", f"{images}/**x"], "no glob"),
        (["--status"], "no job has begun here"),
    ]
    for flags, said in cases:
        assert_refused([*flags, "--output", str(tmp_path / "out")], said)
    engine = ["--engine", str(bundle), "--input", str(images)]
    assert_refused([*engine, "--output", str(tmp_path / "file")], "give a folder")
    assert_refused([*engine, "--output", str(tmp_path / "mine")], "other.parquet is not from here")
    assert_refused(
        ["--engine", str(bundle), "--input", str(tmp_path / "file"), "--output", str(scored)], "give another --output"
    )


def assert_refused(flags: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, "-m", "serving.batch", *flags], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_dry_run_and_status(
    bundle: Path, images: Path, scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--engine", str(bundle), "--input", str(images)]
    batch.main([*flags, "--output", str(tmp_path / "out"), "--dry-run"])
    assert "left: 150 inputs" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    batch.main(["--output", str(scored), "--status"])
    said = capsys.readouterr().out
    assert "150 of 150 rows (100.0 %), 0 errors" in said
    assert ": done, " in said


def test_overlays_of_the_most_and_least_confident(bundle: Path, images: Path, scored: Path) -> None:
    # Nothing is left to score, so the command needs no cluster.
    batch.main(["--engine", str(bundle), "--input", str(images), "--output", str(scored), "--overlays", "2"])
    drawn = sorted(path.name for path in (scored / "_overlays").iterdir())
    scores = sorted(read_scores(scored)["score"].to_pylist())
    assert [name.split("-")[0] for name in drawn] == ["least", "least", "most", "most"]
    assert [name.split("-")[2] for name in drawn] == [f"{scores[k]:.3f}" for k in (0, 1, -1, -2)]
    assert pq.read_table(scored).num_rows == 150
