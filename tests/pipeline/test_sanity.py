"""The randomisation checks: what is randomised, what stays, and that likeness falls."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline import randomisation
from pipeline.bundle import Bundle, load_bundle
from pipeline.data.splits import read_split
from pipeline.randomisation import (
    MEASURES,
    compare,
    fixed_masker,
    masks_of,
    randomised,
    stages,
    training_accuracy,
)
from pipeline.reporting import FolderReporter
from pipeline.sanity import TITLES, main
from pipeline.settings import configure
from pipeline.training import Normaliser, TrainingPlan, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sanity") / "data"
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(("dark", "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(6):
                pixels = random.integers(120 * label, 120 * label + 100, (64, 64, 3)).astype(np.uint8)
                pixels[16:40, 10 + 4 * k : 30 + 4 * k] = 255 * label
                Image.fromarray(pixels).save(folder / f"{k}.png")
    return root


@pytest.fixture(scope="module")
def bundle(data: Path) -> Bundle:
    return trained(data, "torchvision", "resnet18", input_size=64)


@pytest.fixture(scope="module")
def tiny(data: Path) -> Bundle:
    return trained(data, "timm", "test_resnet", input_size=32)


def trained(data: Path, source: str, name: str, *, input_size: int) -> Bundle:
    split = read_split(data, "train")
    plan = TrainingPlan(
        preset="fix", data=str(data), paths=tuple(split.paths), labels=tuple(split.labels),
        data_classes=tuple(split.classes), class_index=(0, 1), class_names=tuple(split.classes), source=source,
        name=name, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), batchnorm="sync", input_size=input_size, steps=6,
        batch_size=4,
    )  # fmt: skip
    run = data.parent / name
    run.mkdir()
    train(plan, FolderReporter(run))
    return load_bundle(run / "bundle")


@pytest.fixture(scope="module")
def x(bundle: Bundle, data: Path) -> torch.Tensor:
    images = [np.asarray(Image.open(path)) for path in sorted((data / "val").rglob("*.png"))]
    return Normaliser(bundle.spec.mean, bundle.spec.std, "cpu")(np.stack(images))


def test_likeness_is_that_of_the_recorded_masks() -> None:
    """Windows and cells are in pixels of the input, also for masks that are large enough to be compared as they are."""
    golden = np.load(Path(__file__).parents[1] / "golden" / "sanity_a.npz")
    first, second = (golden[key] / 255 for key in ("mask_a_lr", "mask_b_lr"))
    found = compare(first, second, 224)
    assert found == pytest.approx({name: golden[name].mean() for name in MEASURES}, abs=1e-6)


def test_only_the_named_modules_change(bundle: Bundle, x: torch.Tensor) -> None:
    before = bundle.model.state_dict()
    after = randomised(bundle.model, ["layer4.1"], x, seed=0).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("backbone.extractor.layer4.1.") for name in changed)
    again = randomised(bundle.model, ["fc", "layer4.1"], x, seed=0).state_dict()
    name = "backbone.extractor.layer4.1.conv1.weight"
    assert torch.equal(again[name], after[name]), "a module's fresh weights do not depend on what else is randomised"
    assert not torch.equal(randomised(bundle.model, ["layer4.1"], x, seed=1).state_dict()[name], after[name])


def test_randomised_batchnorm_has_the_statistics_of_the_images(bundle: Bundle, x: torch.Tensor) -> None:
    """With mean 0 and variance 1 instead the maps of fresh layers fade, and the check would measure that."""
    model = randomised(bundle.model, stages(bundle.model, depth=2), x, seed=0)
    outputs: list[torch.Tensor] = []
    layers = [part for part in model.backbone.modules() if isinstance(part, _BatchNorm)]
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))  # ReLU is in place
    masks_of(model, x)
    assert len(outputs) == len(layers) and all(layer.momentum == 0.1 and not layer.training for layer in layers)
    for output in outputs:
        assert float(output.mean((0, 2, 3)).abs().max()) < 0.1
        assert float(output.var((0, 2, 3)).min()) > 0.8


def test_from_the_output_down(bundle: Bundle) -> None:
    names = stages(bundle.model, depth=2)
    assert names[0] == "fc" and names[1] == "layer4.1" and names[-1] == "conv1"


def test_a_model_is_like_itself_and_unlike_noise(bundle: Bundle, x: torch.Tensor) -> None:
    masks = masks_of(bundle.model, x)
    same = compare(masks, masks, 64)
    assert all(same[name] == pytest.approx(1.0, abs=1e-6) for name in MEASURES)
    noise = np.random.default_rng(0).uniform(size=masks.shape).astype(np.float32)
    assert abs(compare(masks, noise, 64)["spearman"]) < 0.2


def test_the_head_does_not_matter_and_the_maps_do(bundle: Bundle, x: torch.Tensor) -> None:
    """Under a fixed masker the head is behind the maps that it reads."""
    cascading = dict(fixed_masker(bundle, x, depth=1, seed=0, cascading=True))
    independent = dict(fixed_masker(bundle, x, depth=1, seed=0, cascading=False))
    assert cascading["fc"]["spearman"] == pytest.approx(1.0)
    assert cascading["conv1"]["spearman"] < 0.9
    assert independent["fc"] == cascading["fc"]
    assert set(cascading) == set(independent)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[TrainingPlan]:
    """The plans of the runs that are started, in their order."""
    plans: list[TrainingPlan] = []

    def started(plan: TrainingPlan, reporter: FolderReporter) -> None:
        plans.append(plan)
        train(plan, reporter)

    monkeypatch.setattr(randomisation, "train", started)
    return plans


def test_training_accuracy_is_that_of_the_last_steps(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    right = [0.25] * 18 + [0.5, 1.0]
    (tmp_path / "state" / "log.csv").write_text(
        "step,clean_right\n" + "".join(f"{k},{v}\n" for k, v in enumerate(right))
    )
    assert training_accuracy(tmp_path) == 0.75


def test_the_command(tiny: Bundle, data: Path, tmp_path: Path, runs: list[TrainingPlan]) -> None:
    """All five questions, with trainings of two steps."""
    out = tmp_path / "out"
    command = ["--model", str(tiny.path), "--data", str(data), "--out", str(out), "--images", "4", "--depth", "1"]
    main([*command, "--retrain", "2", "--points", "1", "--labels", "2"])
    result = json.loads((out / "sanity.json").read_text())
    assert result["protocol"]["images"] == 4
    assert {path.name for path in out.iterdir()} == {"sanity.json"} | {f"{name}.png" for name in TITLES}
    modules = {name: [row["module"] for row in result[name]] for name in TITLES}
    whole = stages(tiny.model, depth=1)
    assert modules == {
        "cascading": whole, "independent": whole, "labels": ["true labels", "random labels"],
        "cascading-retrained": ["(none)", "conv1"], "independent-retrained": ["(none)", "conv1"],
    }  # fmt: skip
    assert all(row["spearman"] is not None for name in TITLES for row in result[name])
    all_of_it, first_layer = (result[f"{kind}-retrained"][1] for kind in ("cascading", "independent"))
    assert all_of_it != first_layer

    # A reference, a control, and what differs from the control by the classifier or the labels alone.
    assert [plan.seed for plan in runs] == 3 * [0, 1, 1]
    assert all(configure(plan.preset, plan.settings).classifier == "frozen" for plan in runs[:6])
    reference, control, random = runs[6:]
    assert reference.labels == control.labels != random.labels
    assert sorted(random.labels) == sorted(reference.labels)
    true, other = result["labels"]
    assert true["spearman"] != other["spearman"]
    assert true["reference_training_accuracy"] == other["reference_training_accuracy"]


def test_the_command_says_how_well_random_labels_were_learnt(
    tiny: Bundle, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    likeness = dict.fromkeys(MEASURES, 0.5)
    pairs = [(name, likeness | {"training_accuracy": right}) for name, right in (("true", 0.9), ("random", 0.4))]
    monkeypatch.setattr(randomisation, "random_labels", lambda *a, **k: iter(pairs))
    monkeypatch.setattr(randomisation, "fixed_masker", lambda *a, **k: iter(pairs))
    command = ["--model", str(tiny.path), "--data", str(data), "--out", str(tmp_path / "out")]
    main([*command, "--labels", "2"])
    said = capsys.readouterr().out
    assert said.count("; true right on 90% of the training images; random right on 40% of the training images") == 1
    wrong = subprocess.run(
        [sys.executable, "-m", "pipeline.sanity", *command, "--images", "1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert wrong.returncode == 2 and "--images 1: give a number of at least 2" in wrong.stderr
