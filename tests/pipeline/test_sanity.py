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

from pipeline.bundle import Bundle, load_bundle
from pipeline.data.splits import read_split
from pipeline.randomisation import (
    MEASURES,
    compare,
    fixed_masker,
    masks_of,
    random_labels,
    randomised,
    retrained_masker,
    stages,
)
from pipeline.reporting import FolderReporter
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
    split = read_split(data, "train")
    plan = TrainingPlan(
        preset="fix", data=str(data), paths=tuple(split.paths), labels=tuple(split.labels),
        data_classes=tuple(split.classes), class_index=(0, 1), class_names=tuple(split.classes), source="torchvision",
        name="resnet18", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), batchnorm="sync", input_size=64, steps=6, batch_size=4,
    )  # fmt: skip
    (data.parent / "run").mkdir()
    train(plan, FolderReporter(data.parent / "run"))
    return load_bundle(data.parent / "run" / "bundle")


@pytest.fixture(scope="module")
def x(bundle: Bundle, data: Path) -> torch.Tensor:
    images = [np.asarray(Image.open(path)) for path in sorted((data / "val").rglob("*.png"))]
    return Normaliser(bundle.spec.mean, bundle.spec.std, "cpu")(np.stack(images))


def test_only_the_named_modules_change(bundle: Bundle) -> None:
    before = bundle.model.state_dict()
    after = randomised(bundle.model, ["layer4.1"], seed=0).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("backbone.extractor.layer4.1.") for name in changed)
    again = randomised(bundle.model, ["fc", "layer4.1"], seed=0).state_dict()
    name = "backbone.extractor.layer4.1.conv1.weight"
    assert torch.equal(again[name], after[name]), "a module's fresh weights do not depend on what else is randomised"
    assert not torch.equal(randomised(bundle.model, ["layer4.1"], seed=1).state_dict()[name], after[name])


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


def test_retrained_maskers_and_random_labels(bundle: Bundle, x: torch.Tensor, data: Path, tmp_path: Path) -> None:
    common = {"depth": 1, "seed": 0, "steps": 2, "points": 1}
    retrained = []
    for cascading in (True, False):
        found = list(
            retrained_masker(bundle, x, str(data), cascading=cascading, folder=tmp_path / str(cascading), **common)
        )
        assert [name for name, _ in found] == ["(none)", "conv1"]
        retrained += found
    assert retrained[1] != retrained[3]  # all of the classifier, or its first layer alone
    labels = list(random_labels(bundle, x, str(data), seed=0, steps=2, folder=tmp_path / "l"))
    assert [name for name, _ in labels] == ["true labels", "random labels"]
    assert all(np.isfinite(row["spearman"]) for _, row in retrained + labels)


def test_the_command(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.sanity", "--model", str(bundle.path), "--data", str(data)]
    command += ["--out", str(tmp_path / "out"), "--images", "4", "--depth", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "out" / "sanity.json").read_text())
    assert result["protocol"]["images"] == 4 and result["cascading"][0]["module"] == "fc"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sanity.json", "cascading.png", "independent.png"}
    wrong = subprocess.run([*command, "--images", "0"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2 and "--images 0" in wrong.stderr
