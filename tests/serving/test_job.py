"""What a job decides: what is left, what is another version, what is refused.  Scored in this process, without Ray."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving import batch
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
