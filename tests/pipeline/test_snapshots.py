"""Earlier classifiers of a run are written once, kept as long as a checkpoint may need them, and resumed from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import training
from pipeline.data.planted import write_planted
from pipeline.errors import WorkError
from pipeline.planning import plan_training
from pipeline.reporting import FolderReporter
from pipeline.snapshots import REMEMBERED, Snapshots, file_name
from pipeline.train import parser


def a_state(value: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3,), float(value))}


def test_each_is_written_once_and_goes_when_no_checkpoint_needs_it(tmp_path: Path) -> None:
    folder = tmp_path / "population"
    snapshots = Snapshots(str(tmp_path))
    snapshots.keep({0: a_state(0), 9: a_state(9)})
    first = (folder / file_name(0)).stat()
    (folder / "notes.txt").touch()
    for number in range(1, REMEMBERED + 1):
        snapshots.keep({0: a_state(-1), 10 * number: a_state(number)})
        assert (folder / file_name(9)).exists() == (number < REMEMBERED)
    assert (folder / file_name(0)).stat().st_ino == first.st_ino, "what is there is not written again"
    assert snapshots.read(0)["weight"].tolist() == [0, 0, 0]
    assert {file.name for file in folder.iterdir()} == {"notes.txt", *(file_name(k) for k in (0, 10, 20, 30))}


def test_what_a_killed_attempt_left_is_written_anew(tmp_path: Path) -> None:
    Snapshots(str(tmp_path)).keep({0: a_state(0), 5: a_state(1)})
    resumed = Snapshots(str(tmp_path))
    resumed.resumed([0])
    resumed.keep({0: a_state(2), 5: a_state(2)})
    assert resumed.read(0)["weight"][0] == 0 and resumed.read(5)["weight"][0] == 2


def test_one_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    snapshots = Snapshots(str(tmp_path))
    snapshots.keep({7: a_state(7), 9: a_state(9)})
    place = tmp_path / "population" / file_name(7)
    place.write_bytes(place.read_bytes()[:50])
    place.with_name(file_name(9)).write_bytes(b"something else")
    for taken in (7, 8, 9):
        with pytest.raises(WorkError, match=f"population/{taken:09d}.pt, an earlier classifier of the run"):
            snapshots.read(taken)


class InARun(FolderReporter):
    """Keeps snapshots as a run on Ray does, and is stopped after a checkpoint."""

    def __init__(self, run: Path, *, stop: int | None = None) -> None:
        super().__init__(run / "state")
        self.run = str(run)
        self.stop = stop

    def checkpoint(self, write: Any, row: dict[str, Any], **how: Any) -> None:
        super().checkpoint(write, row, **how)
        if row["step"] == self.stop:
            raise KeyboardInterrupt


def test_a_resumed_run_has_the_population_of_an_undisturbed_one(tmp_path: Path) -> None:
    write_planted(tmp_path / "data", seed=0, size=32, per_class_train=2, per_class_val=1)
    words = ["--preset", "ca", "--data", str(tmp_path / "data"), "--out", "unused", "--init", "timm:test_resnet"]
    words += ["--image-size", "32", "--batch-size", "4", "--steps", "10", "--precision", "fp32"]
    for setting in ("population.save_every=2", "population.size=2", "population.probability=0.7", "pretraining=0.1"):
        words += ["--set", setting]
    plan = replace(plan_training(parser().parse_args(words)), checkpoint_seconds=1e-9)
    training.train(plan, InARun(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        training.train(plan, InARun(tmp_path / "again", stop=6))
    training.train(plan, InARun(tmp_path / "again"), resume=tmp_path / "again" / "state")
    whole, again = (torch.load(tmp_path / name / "state" / "state.pt") for name in ("whole", "again"))
    assert whole["snapshots"] == again["snapshots"] and len(whole["snapshots"]) == 2
    assert whole["population"] == again["population"] == []
    for name, value in whole["model"].items():
        assert torch.equal(value, again["model"][name]), name
    for taken in whole["snapshots"]:
        one, two = (Snapshots(str(tmp_path / name)).read(taken) for name in ("whole", "again"))
        assert all(torch.equal(one[name], two[name]) for name in one)
