"""Whose a run's folder is, and what appears in it."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path

import numpy as np
import pyarrow.fs
import pytest
import torch
from safetensors.torch import save_file

from pipeline import run_folder
from pipeline.data import store
from pipeline.errors import UsageError
from pipeline.run_folder import PLAN_FILE, claim_run, keep_weights, open_storage, weights_here
from pipeline.step_log import COLUMNS, StepLog

FILES = pyarrow.fs.LocalFileSystem()
FIELDS = {"paths": ["a.jpg", "b.jpg"], "labels": [0, 1], "data": "/here", "preset": "fix", "seed": 0, "steps": 10}


def test_the_same_run_goes_on_wherever_its_data_are(tmp_path: Path) -> None:
    claim_run(FILES, str(tmp_path / "run"), FIELDS)
    claim_run(FILES, str(tmp_path / "run"), FIELDS | {"data": "s3://elsewhere", "steps": 20})
    assert "data" not in json.loads((tmp_path / "run" / PLAN_FILE).read_text())
    for changed in ({"seed": 1}, {"paths": ["a.jpg", "c.jpg"]}, {"labels": [1, 0]}):
        with pytest.raises(UsageError, match=r"holds a run with another (seed|listing)"):
            claim_run(FILES, str(tmp_path / "run"), FIELDS | changed)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_plan_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / PLAN_FILE).write_text(content)
    with pytest.raises(UsageError, match=r"plan\.json is damaged; delete it"):
        claim_run(FILES, str(tmp_path), FIELDS)


def test_files_appear_whole(tmp_path: Path) -> None:
    """A plan is written beside its place first: whoever is killed in between leaves none, and not half of one."""
    seen: list[str] = []

    class Files(pyarrow.fs.LocalFileSystem):
        def move(self, source: str, target: str) -> None:
            seen.append(Path(target).name)
            assert not Path(target).exists() and json.loads(Path(source).read_text())["preset"] == "fix"
            Path(source).rename(target)

    claim_run(Files(), str(tmp_path / "run"), FIELDS)
    assert seen == [PLAN_FILE] and (tmp_path / "run" / PLAN_FILE).is_file()


def test_weights_move_into_the_run_and_are_known_by_their_content(tmp_path: Path) -> None:
    first, second = tmp_path / "mine.safetensors", tmp_path / "elsewhere" / "again.safetensors"
    save_file({"a": torch.arange(3.0)}, first)
    second.parent.mkdir()
    shutil.copyfile(first, second)
    out = str(tmp_path / "run")
    (tmp_path / "run").mkdir()

    def keep(weights: object) -> tuple[str, str]:
        with weights_here(str(weights)) as (file, known):
            return keep_weights(file, known, FILES, out, out), known

    place, known = keep(first)
    assert Path(place).read_bytes() == first.read_bytes() and Path(place).suffix == ".safetensors"
    assert keep(second) == (place, known)
    Path(place).write_bytes(b"cut off")
    keep(second)
    assert Path(place).read_bytes() == first.read_bytes()
    save_file({"a": torch.arange(4.0)}, second)
    other, known_other = keep(second)
    assert other != place and known_other != known and known.startswith("sha256:")
    memory = f"memory://weights/{uuid.uuid4().hex}.safetensors"  # an object store is one more place to read it from
    store.write_bytes(memory, first.read_bytes())
    assert keep(memory) == (place, known)


def test_a_bundle_that_is_published_again_is_none_in_between(tmp_path: Path, monkeypatch) -> None:
    """New weights under the old description would load, and be neither of the two."""
    checkpoint, root = tmp_path / "checkpoint", tmp_path / "store"
    (checkpoint / "bundle").mkdir(parents=True)
    for name in ("model.json", "model.safetensors", "samples.safetensors"):
        (checkpoint / "bundle" / name).write_text(f"new {name}")
    (root / "bundle").mkdir(parents=True)
    (root / "bundle" / "model.json").write_text("old")
    remote = pyarrow.fs.SubTreeFileSystem(str(root), FILES)  # not a local one by its type, as object stores
    states: list[bool] = []
    upload = run_folder.upload

    def watched(file: Path, filesystem: pyarrow.fs.FileSystem, target: str) -> None:
        states.append((root / "bundle" / "model.json").read_text() != "")
        upload(file, filesystem, target)

    monkeypatch.setattr(run_folder, "upload", watched)
    run_folder.publish(checkpoint, None, remote, "")  # pyright: ignore[reportArgumentType]  asked for samples only
    assert states == [False, False, False]
    assert (root / "bundle" / "model.json").read_text() == "new model.json"


def test_storage_that_is_none() -> None:
    with pytest.raises(UsageError, match="--out nostore://x"):
        open_storage("nostore://x")


@pytest.mark.parametrize("out", ["s3://b/r?endpoint_override=h", "s3://key:secret@b/r", "s3://b/my%20run"])
def test_what_libraries_read_in_different_ways_is_refused(out: str) -> None:
    with pytest.raises(UsageError, match=r"holds no '[?@%]'.*AWS_ENDPOINT_URL"):
        open_storage(out)


def test_the_log_goes_on_where_it_ended(tmp_path: Path) -> None:
    log = StepLog()
    log.add({"step": 1, "phase": "joint", "clean_loss": np.float32(0.5), "other": 7})
    log.write(tmp_path / "log.csv")
    again = StepLog()
    again.read(tmp_path / "log.csv")
    again.add({"step": 2, "phase": "joint"})
    again.write(tmp_path / "again.csv")
    lines = (tmp_path / "again.csv").read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS) and lines[1].startswith("1,joint,,,0.5,") and lines[2].startswith("2,joint,,")
    assert (tmp_path / "log.csv").read_text().splitlines() == lines[:2]
