"""Validation beside the training: its figures, its files, and the checkpoint that is chosen by them."""

from __future__ import annotations

import csv
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.board import Board
from pipeline.bundle import load_bundle
from pipeline.cli import run
from pipeline.data.planted import write_planted
from pipeline.errors import WorkError
from pipeline.evaluate import evaluate
from pipeline.planning import plan_training
from pipeline.ray_training import best_of
from pipeline.train import main, parser
from pipeline.validation_schedule import ValidationSchedule

ENVIRONMENT = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": "", "RAY_ADDRESS": "local"}


def scalars(folder: Path) -> dict[str, list[int]]:
    """Names and steps of the scalars that TensorBoard shows of a folder: a session that starts at a step hides the rest."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found: dict[str, list[int]] = {}
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            if event.session_log.status == SessionLog.START:
                found = {name: [step for step in steps if step < event.step] for name, steps in found.items()}
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
            data = data[16 + length :]
    return found


def test_boards_of_one_second_keep_their_own_files(tmp_path: Path) -> None:
    for step in (3, 1, 2):
        board = Board(str(tmp_path), "validation")
        board.add(step, {"LE": 0.5, "name": "left out"})
        board.close()
    assert {tag: sorted(steps) for tag, steps in scalars(tmp_path / "tensorboard" / "validation").items()} == {
        "LE": [1, 2, 3]
    }


def test_a_run_that_goes_on_hides_what_it_takes_back(tmp_path: Path) -> None:
    for first, last in ((0, 5), (3, 6)):
        board = Board(str(tmp_path), "train", first_step=first)
        for step in range(first + 1, last + 1):
            board.add(step, {"loss": float(step)})
        board.close()
        time.sleep(1.1)  # files are read by their names, which tell seconds
    assert scalars(tmp_path / "tensorboard" / "train")["loss"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.timeout(900)
def test_the_best_checkpoint_becomes_the_bundle(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    write_planted(data, seed=0, size=48, per_class_train=4, per_class_val=2)
    command = [
        sys.executable,
        "-m",
        "pipeline.train",
        "--data",
        str(data),
        "--out",
        str(out),
        "--init",
        "timm:test_resnet",
    ]
    command += ["--image-size", "48", "--batch-size", "8", "--steps", "32", "--set", "pretraining=0.2"]
    command += ["--validate-every", "epoch", "--checkpoint-every", "1s", "--validation-images", "16", "--select", "LE"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    with (out / "validation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 2 and int(rows[-1]["step"]) == 32
    assert all(0 <= float(row["LE"]) <= 1 and row["n_images"] == "16.0" for row in rows)
    best = min(float(row["LE"]) for row in rows)
    assert f"chosen by LE: {best:.4f}" in done.stdout
    bundle = load_bundle(out / "bundle")
    chosen = next(row for row in rows if int(row["step"]) == bundle.spec.training["steps"])
    assert float(chosen["LE"]) == best
    assert bundle.samples is not None and bundle.spec.mask_statistics
    again = evaluate(bundle, data, limit=16, baselines=(), original="none", progress=False)
    assert again["LE"] == pytest.approx(best)

    seen = scalars(out / "tensorboard" / "train")
    assert seen["train/clean_loss"] == list(range(1, 33)) and seen["train/mask_mean"][-1] == 32
    assert sorted(scalars(out / "tensorboard" / "validation")["LE"]) == sorted(int(row["step"]) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--select", "LE"], "nothing is validated; add --validate-every"),
        (["--validate-every", "soon"], "give a time such as 90s"),
        (["--validate-every", "1m"], "no folder val/"),
        (["--validate-every", "1m", "--validation-images", "0"], "give a number of at least 1"),
    ],
)
def test_wrong_use(tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_planted(tmp_path / "all", seed=0, size=32, per_class_train=1, per_class_val=1)
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "all" / "train").rename(data / "train")
    with pytest.raises(SystemExit) as end:
        run(
            main,
            "pipeline.train",
            ["--data", str(data), "--out", str(tmp_path / "run"), "--init", "resnet18", *arguments],
        )
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_nothing_to_choose_from() -> None:
    with pytest.raises(WorkError, match="no checkpoint in RUN has a figure LE"):
        best_of([], "LE", "RUN")


def test_validations_are_due_by_the_clock_or_by_passes() -> None:
    def asked(schedule: ValidationSchedule, busy: range = range(0)) -> list[int]:
        found = []
        for step in range(1, 31):
            if schedule.due(step, 2.0 * step):
                if step in busy:
                    schedule.later(step, 2.0 * step)
                else:
                    schedule.asked(step, 2.0 * step)
                    found.append(step)
        return found

    assert asked(ValidationSchedule(seconds=None, steps=None, step=0, spent=0.0)) == []
    assert asked(ValidationSchedule(seconds=None, steps=8, step=0, spent=0.0)) == [8, 16, 24]
    assert asked(ValidationSchedule(seconds=None, steps=8, step=10, spent=0.0))[0] == 16, (
        "a resumed run keeps to its passes"
    )
    assert asked(ValidationSchedule(seconds=None, steps=8, step=0, spent=0.0), busy=range(7, 13)) == [14, 16, 24]
    assert asked(ValidationSchedule(seconds=20.0, steps=None, step=0, spent=0.0)) == [10, 20, 30]
    assert asked(ValidationSchedule(seconds=20.0, steps=None, step=0, spent=0.0), busy=range(9, 12)) == [13, 23]


def test_an_epoch_is_a_pass_over_the_data(tmp_path: Path) -> None:
    write_planted(tmp_path, seed=0, size=48, per_class_train=4, per_class_val=1)
    words = ["--data", str(tmp_path), "--out", "unused", "--init", "resnet18", "--batch-size", "8"]
    plan = plan_training(parser().parse_args([*words, "--validate-every", "epoch"]))
    assert plan.validates and (plan.validate_seconds, plan.validate_steps) == (None, 5)
    plan = plan_training(parser().parse_args([*words, "--validate-every", "2m"]))
    assert plan.validates and (plan.validate_seconds, plan.validate_steps) == (120.0, None)
    assert not plan_training(parser().parse_args(words)).validates
