"""`python -m pipeline.train` for real: on a local Ray, resumed, submitted as a job, and refused with one line."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import clean_cache, training
from pipeline.bundle import load_bundle
from pipeline.clean_cache import CleanCache
from pipeline.data import store
from pipeline.data.planted import write_planted
from pipeline.errors import UsageError
from pipeline.planning import plan_training
from pipeline.reporting import FolderReporter
from pipeline.train import main, parse_workers, parser
from pipeline.training import TrainingPlan
from tests.s3_server import s3_server

ENVIRONMENT = os.environ | {
    "RAY_USAGE_STATS_ENABLED": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "RAY_ADDRESS": "local",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
SMALL = ("--init", "timm:test_resnet", "--image-size", "32", "--batch-size", "8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planted")
    write_planted(root, seed=0, size=48, per_class_train=4, per_class_val=1)
    return root


def train(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.train", *(str(a) for a in arguments)]
    environment = ENVIRONMENT | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def committed(out: Path) -> list[str]:
    """The log of the checkpoint that the next start of the run in ``out`` goes on from; empty while there is none.

    That is the one which Ray's list names, and the newest where the list was torn by what ended the run.
    """
    logs = sorted(out.glob("checkpoints/checkpoint_*/log.csv"))
    try:
        index = json.loads((out / "checkpoints" / "checkpoint_manager_snapshot.json").read_text())
        name = index["latest_checkpoint_result"]["checkpoint_dir_name"]
    except (OSError, ValueError, TypeError):
        name = logs[-1].parent.name if logs else ""
    return (out / "checkpoints" / name / "log.csv").read_text().splitlines() if name else []


def train_here(folder: Path, *arguments: object) -> tuple[TrainingPlan, list[str]]:
    """What a worker of the command does, in this process; returns its plan and the phase of each step."""
    plan = replace(plan_training(parser().parse_args([str(word) for word in arguments])), threads=1)
    phases: list[str] = []
    training.train(plan, FolderReporter(folder, lambda row: phases.append(row["phase"])))
    return plan, phases


def test_the_flags_are_frozen() -> None:
    flags = {option for action in parser()._actions for option in action.option_strings}
    assert flags == {
        "-h", "--help", "--preset", "--data", "--out", "--init", "--init-arg", "--weights", "--mean", "--std",
        "--batchnorm", "--class-map", "--class-names", "--per-class", "--image-size", "--geometry", "--layers",
        "--size-target", "--set", "--fill", "--batch-size", "--epochs", "--steps", "--budget", "--workers", "--cpus-per-worker", "--gpu",
        "--precision",
        "--checkpoint-every", "--seed", "--recipe", "--dry-run",
        "--validate-every", "--validation-images", "--select",
    }  # fmt: skip
    assert parse_workers("3") == 3 and parse_workers("1:4") == (1, 4)


@pytest.mark.timeout(1500)
def test_trains_from_s3_to_s3_and_resumes(data: Path, tmp_path: Path) -> None:
    with s3_server() as settings:
        files, _ = store.filesystem("s3://trainings")
        files.mkdir("trainings")
        for file in data.rglob("*"):
            if file.is_file():
                store.write_bytes(f"s3://trainings/set/{file.relative_to(data)}", file.read_bytes())
        out = "s3://trainings/runs/one"
        # One checkpoint in each run: the server keeps all that it gets in this process's memory.
        arguments = ("--preset", "fix", "--data", "s3://trainings/set", "--out", out, *SMALL)

        def log() -> list[str]:
            return store.read_bytes(f"{out}/log.csv").decode().splitlines()

        first = train(*arguments, "--steps", 6, **settings)
        assert first.returncode == 0, first.stderr[-2000:]
        files.get(f"{out}/bundle", str(tmp_path / "bundle"), recursive=True)
        bundle = load_bundle(tmp_path / "bundle")
        assert bundle.spec.preset == "fix" and bundle.spec.training["steps"] == 6
        assert bundle.samples is not None and bundle.samples.shape == (40, 32, 32, 3)
        assert set(bundle.spec.mask_statistics) == {"area", "entropy", "off_centre"}
        before = log()
        index = f"{out}/checkpoints/checkpoint_manager_snapshot.json"
        store.write_bytes(index, store.read_bytes(index)[:100])  # what a driver that is killed while it writes leaves
        again = train(*arguments, "--steps", 9, **settings)
        assert again.returncode == 0, again.stderr[-2000:]
        assert "was torn; going on from checkpoint_" in again.stdout and "step 6" in again.stdout
        assert [int(row["step"]) for row in csv.DictReader(log())] == list(range(1, 10))
        assert log()[:7] == before, "the second run went on where the first one ended, and took none of its steps again"
        with pytest.raises(UsageError, match="another seed"):
            main([str(word) for word in (*arguments, "--steps", 9, "--seed", 5)])


def test_a_class_map_keeps_the_classifier_head(data: Path, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    classifier = timm.create_model("test_resnet", num_classes=20)
    save_file(classifier.state_dict(), tmp_path / "mine.safetensors")
    folders = sorted(path.name for path in (data / "train").iterdir())
    rows = "".join(f"{folder},{19 - k}\n" for k, folder in enumerate(folders))
    (tmp_path / "map.csv").write_text("folder,index\n" + rows)
    train_here(
        tmp_path / "state",
        *("--preset", "fix", "--data", data, "--out", tmp_path / "run", "--init", "timm:test_resnet", "--steps", 2),
        *("--weights", tmp_path / "mine.safetensors", "--class-map", tmp_path / "map.csv", "--image-size", 32),
        *("--batch-size", 4, "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"),
    )
    bundle = load_bundle(tmp_path / "state/bundle")
    spec = bundle.spec
    assert spec.backbone.outputs == 20 and spec.class_index == [19 - k for k in range(10)]
    assert spec.class_names[19] == folders[0] and spec.class_names[0] == "class 0"
    assert spec.std == (0.25, 0.25, 0.25) and spec.backbone.batchnorm == "eval"
    kept = bundle.model.backbone.state_dict()
    for name, value in classifier.state_dict().items():
        assert np.array_equal(kept[f"extractor.{name}"], value), f"{name} of a frozen classifier moved"


def test_without_a_class_map_a_frozen_classifier_gets_a_new_head_and_nothing_else(data: Path, tmp_path: Path) -> None:
    import torch
    import torchvision
    from safetensors.torch import save_file

    torch.manual_seed(1)
    classifier = torchvision.models.resnet18(num_classes=20)
    save_file(classifier.state_dict(), tmp_path / "mine.safetensors")
    words = ("--preset", "fix", "--data", data, "--out", tmp_path / "run", *SMALL, "--steps", 4, "--init", "resnet18")
    plan, phases = train_here(tmp_path / "state", *words, "--weights", tmp_path / "mine.safetensors")
    assert phases == ["classifier"] * 2 + ["joint"] * 2
    kept = load_bundle(tmp_path / "state/bundle").model.backbone.state_dict()
    fresh = training.build(plan)[0].backbone.state_dict()
    moved = {name for name, value in fresh.items() if not torch.equal(kept[name], value)}
    assert moved == {"extractor.fc.weight", "extractor.fc.bias"}
    for name, value in classifier.state_dict().items():
        assert name.startswith("fc.") or torch.equal(kept[f"extractor.{name}"], value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "/nowhere"), "/nowhere"),
        (("--init", "resnet9000"), "resnet9000"),
        (("--weights", "missing.pt"), "missing.pt"),
        (("--workers", "4:1"), "--workers 4:1"),
        (("--workers", "9", "--batch-size", "8"), "--workers 9: more than the 8 pictures of a step"),
        (("--budget", "soon"), "--budget soon"),
        (("--mean", "1,2"), "--mean 1,2"),
        (("--layers", "9"), "--layers 9"),
        (("--class-map", "nothing.csv"), "nothing.csv"),
        (("--preset", "best"), "--preset"),
        (("--init-arg", "pad"), "--init-arg pad"),
        (("--steps", "-5"), "--steps -5: give a number of at least 1"),
        (("--batch-size", "0"), "--batch-size 0: give"),
        (("--epochs", "nan"), "--epochs nan: give"),
        (("--seed", "-1"), "--seed -1: give"),
        (("--per-class", "0"), "--per-class 0: give"),
        (("--cpus-per-worker", "0"), "--cpus-per-worker 0: give"),
        (("--seed", str(2**70)), "give a number of at most 2147483647"),
        (("--epochs", "1e308"), "--epochs 1e+308: give"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(
    data: Path, tmp_path: Path, arguments: tuple[str, ...], words: str, capsys
) -> None:
    from pipeline.cli import run

    command = [
        "--data",
        str(data),
        "--out",
        str(tmp_path / "run"),
        "--init",
        "resnet18",
        "--image-size",
        "32",
        *arguments,
    ]
    with pytest.raises(SystemExit) as end:
        run(main, "pipeline.train", command)
    stderr = capsys.readouterr().err
    assert end.value.code == 2
    assert words in stderr and stderr.count("\n") == 1, stderr
    assert not (tmp_path / "run").exists()


def test_a_frozen_classifier_is_asked_once_for_each_view(data: Path, tmp_path: Path, monkeypatch) -> None:
    """The preset shows pictures whole, so that there are few views of a few pictures; the weights are the same without."""
    import torch
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    torch.manual_seed(1)
    save_file(resnet18(num_classes=10).state_dict(), tmp_path / "w.safetensors")
    words = ["--preset", "fix", "--data", data, "--out", "unused", *SMALL, "--init", "resnet18", "--steps", 12]
    words += ["--weights", tmp_path / "w.safetensors", "--per-class", 1, "--set", "augmentation.mirror=false"]
    hits: list[bool] = []
    find = CleanCache.find

    def watched(self: CleanCache, keys: Any) -> Any:
        found = find(self, keys)
        hits.append(found is not None)
        return found

    monkeypatch.setattr(CleanCache, "find", watched)
    train_here(tmp_path / "kept", *words)
    assert hits[-8:] == [True] * 8, "ten views, eight a step: all have been seen after two"
    monkeypatch.setattr(clean_cache, "MOST_BYTES", 0)
    train_here(tmp_path / "asked", *words)
    kept, asked = (load_bundle(tmp_path / name / "bundle").model.state_dict() for name in ("kept", "asked"))
    assert all(torch.equal(kept[name], asked[name]) for name in kept)


def test_boxes_of_other_pictures_are_none(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(data, root)
    table = root / "boxes.csv"
    table.write_text("".join(line for line in table.open() if not line.startswith("val/")))
    words = ["--data", str(root), "--out", "unused", *SMALL, "--validate-every", "epoch", "--select"]
    with pytest.raises(UsageError, match=r"--select LE: .* has no boxes\.csv with pictures of val"):
        plan_training(parser().parse_args([*words, "LE"]))
    assert plan_training(parser().parse_args([*words, "top1"])).validates


class Leaving(FolderReporter):
    """Of a machine that is told, while it trains, that it will be taken away."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.saved: list[int] = []

    def leaving(self) -> bool:
        return True

    def checkpoint(self, write: Any, row: dict[str, Any], **how: Any) -> None:
        super().checkpoint(write, row, **how)
        self.saved.append(row["step"])


def test_a_machine_that_is_about_to_go_gets_one_checkpoint_more(data: Path, tmp_path: Path, monkeypatch) -> None:
    words = ["--preset", "fix", "--data", str(data), "--out", "unused", *SMALL, "--steps", "4"]
    plan = plan_training(parser().parse_args([*words, "--checkpoint-every", "1d"]))
    monkeypatch.setattr(training, "NOTICE_SECONDS", 0.0)
    reporter = Leaving(tmp_path / "state")
    training.train(plan, reporter)
    assert reporter.saved == [1, 4], "once at the notice, and at the end"


def test_a_new_run_has_a_checkpoint_after_seconds(data: Path, tmp_path: Path, monkeypatch) -> None:
    """However long the time between two is, a run that is stopped early has one to go on from."""

    class Here(Leaving):
        def leaving(self) -> bool:
            return False

    words = ["--preset", "fix", "--data", str(data), "--out", "unused", *SMALL, "--steps", "4"]
    plan = plan_training(parser().parse_args([*words, "--checkpoint-every", "1d"]))
    monkeypatch.setattr(training, "FIRST_CHECKPOINT", 0.0)
    first = Here(tmp_path / "first")
    training.train(plan, first)
    assert first.saved == [1, 4]
    resumed = Here(tmp_path / "resumed")
    training.train(replace(plan, steps=6), resumed, resume=tmp_path / "first")
    assert resumed.saved == [6], "a run that goes on has one already"


@pytest.mark.timeout(900)
def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--preset", "fix", "--data", str(data), "--out", str(out), *SMALL, "--checkpoint-every", "1s"]
    command = [sys.executable, "-m", "pipeline.train", *arguments, "--steps", "100000"]
    run = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so would all that it starts, these tests included.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 300
    try:
        while not committed(out):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(1)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        _, stderr = run.communicate(timeout=120)
    finally:
        if run.poll() is None:  # or it takes the cores away from all that follows
            os.killpg(run.pid, signal.SIGKILL)
    # Actors of Ray have a prefix; one of them complains where several clusters run on a machine.
    assert run.returncode == 130 and "\nTraceback" not in f"\n{stderr}", stderr[-3000:]
    before = committed(out)
    saved = len(before) - 1
    words = [str(word) for word in (*arguments, "--steps", saved + 3)]
    plan = replace(plan_training(parser().parse_args(words)), threads=1)
    checkpoint = max(path for path in out.glob("checkpoints/checkpoint_*") if (path / "state.pt").is_file())
    training.train(plan, FolderReporter(tmp_path / "state"), resume=checkpoint)
    after = (tmp_path / "state" / "log.csv").read_text().splitlines()
    assert after[: saved + 1] == before and len(after) == saved + 4, "no step was taken again"


@pytest.mark.timeout(900)
def test_a_fault_that_stays_ends_the_run_with_its_name(data: Path, tmp_path: Path) -> None:
    """A damaged picture is no lost machine: the workers are not started again for ever."""
    root, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, root)
    victim = sorted((root / "train").rglob("*.jpg"))[-1]
    victim.write_bytes(victim.read_bytes()[:200])
    broken = train("--preset", "ca", "--data", root, "--out", out, *SMALL, "--steps", 6)
    assert broken.returncode == 1
    said = [line for line in broken.stderr.splitlines() if "failed 3 times after step 0" in line]
    assert len(said) == 1 and victim.name in said[0] and "mend it" in said[0], broken.stderr[-2000:]
