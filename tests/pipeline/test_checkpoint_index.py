"""Ray's list of checkpoints is made anew from the checkpoints that are whole, and left alone where it holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.fs
import pytest
import torch
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

from pipeline.checkpoint_index import INDEX_FILE, mend_index
from pipeline.validation import SCORE

FILES = pyarrow.fs.LocalFileSystem()


def a_checkpoint(folder: Path, name: str, step: int) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    torch.save(
        {"step": step, "weights": torch.zeros(1000), "snapshots": [step - 1], "population": []}, path / "state.pt"
    )
    population = folder.parent / "population"
    population.mkdir(exist_ok=True)
    (population / f"{step - 1:09d}.pt").touch()
    (path / "log.csv").write_text("step\n" + "".join(f"{k + 1}\n" for k in range(step)))
    return path


def an_index(folder: Path, *names: str) -> Path:
    index = folder / INDEX_FILE
    index.write_text(json.dumps({"checkpoint_results": [{"checkpoint_dir_name": name} for name in names]}))
    return index


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    for k in (1, 2, 3):
        a_checkpoint(folder, f"checkpoint_{k}", 10 * k)
    an_index(folder, "checkpoint_2", "checkpoint_3")
    return folder


def chosen(folder: Path) -> list[str]:
    written = json.loads((folder / INDEX_FILE).read_text())
    assert written["latest_checkpoint_result"] in written["checkpoint_results"]
    return [result["checkpoint_dir_name"] for result in written["checkpoint_results"]]


def test_what_holds_is_left_alone(run: Path, tmp_path: Path) -> None:
    before = (run / INDEX_FILE).read_bytes()
    assert mend_index(FILES, str(run)) is None
    assert (run / INDEX_FILE).read_bytes() == before
    assert mend_index(FILES, str(tmp_path / "new")) is None
    (tmp_path / "empty").mkdir()
    assert mend_index(FILES, str(tmp_path / "empty")) is None


def test_a_torn_list_begins_with_the_newest_whole_checkpoint(run: Path) -> None:
    for content in (b"", b'{"checkpoint_res', b"[]"):
        (run / INDEX_FILE).write_bytes(content)
        said = mend_index(FILES, str(run))
        assert said is not None and "was torn; going on from checkpoint_3, step 30" in said
        assert chosen(run) == ["checkpoint_3"]
    (run / INDEX_FILE).unlink()
    assert "was not there; going on from checkpoint_3" in str(mend_index(FILES, str(run)))


def test_a_checkpoint_that_was_cut_off_is_not_chosen(run: Path) -> None:
    (run / "checkpoint_3" / "state.pt").write_bytes(b"something else")
    (run / "checkpoint_2" / "log.csv").write_text("step\n1\n2\n")
    (run / INDEX_FILE).write_text("{")
    assert "going on from checkpoint_1, step 10" in str(mend_index(FILES, str(run)))
    state = run / "checkpoint_1" / "state.pt"
    state.write_bytes(state.read_bytes()[:-500])
    (run / INDEX_FILE).write_text("{")
    assert "no checkpoint beside it is whole; beginning anew" in str(mend_index(FILES, str(run)))
    assert not (run / INDEX_FILE).exists()


def test_a_checkpoint_that_is_gone_is_not_missed(run: Path) -> None:
    shutil.rmtree(run / "checkpoint_3")
    assert "names a checkpoint that is gone; going on from checkpoint_2, step 20" in str(mend_index(FILES, str(run)))
    assert chosen(run) == ["checkpoint_2"]


def test_a_checkpoint_without_its_snapshots_is_not_chosen(run: Path) -> None:
    (run.parent / "population" / f"{29:09d}.pt").unlink()
    (run / INDEX_FILE).write_text("{")
    assert "going on from checkpoint_2, step 20" in str(mend_index(FILES, str(run)))


def test_a_store_that_does_not_answer_says_nothing_of_a_checkpoint(run: Path, monkeypatch) -> None:
    (run / INDEX_FILE).write_text("{")

    def away(*_: object, **__: object) -> None:
        raise OSError("AWS Error SLOW_DOWN")

    monkeypatch.setattr(pyarrow.fs, "copy_files", away)
    with pytest.raises(OSError, match="SLOW_DOWN"):
        mend_index(FILES, str(run))
    assert (run / INDEX_FILE).read_text() == "{", "not a run that begins anew"


def test_checkpoints_that_were_judged_stay_in_the_list(run: Path, monkeypatch) -> None:
    """`--select` keeps the best one, which need not be the newest, nor have snapshots to go on with; the newest has."""
    monkeypatch.setattr("pipeline.bundle.load_bundle", lambda path: None)
    for name in ("checkpoint_1", "checkpoint_2"):
        (run / name / "bundle").mkdir()
    (run.parent / "population" / "000000009.pt").unlink()  # of checkpoint_1, which nobody goes on from any more
    (run / INDEX_FILE).write_text("{")
    figures = {10: {"LE": 0.3, SCORE: -0.3}, 20: {"LE": 0.5, SCORE: -0.5}, 30: {"LE": 0.1, SCORE: -0.1}}
    assert "going on from checkpoint_3" in str(mend_index(FILES, str(run), lambda step: figures.get(step, {})))
    assert chosen(run) == ["checkpoint_3", "checkpoint_2", "checkpoint_1"], (
        "the best last; 3 has no bundle to be judged"
    )
    written = json.loads((run / INDEX_FILE).read_text())
    assert written["latest_checkpoint_result"]["checkpoint_dir_name"] == "checkpoint_3"
    assert written["checkpoint_report_indices"] == [2, 1, 0] and written["current_report_index"] == 3
    assert written["validated_checkpoint_dir_names"] == ["checkpoint_1", "checkpoint_2"]
    _CheckpointManagerState.parse_obj(written)
