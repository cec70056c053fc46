"""The bundle: written whole, read back the same, refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.backbone import choose_taps, create_classifier, pyramid
from pipeline.bundle import bundle_sha256, load_bundle, save_bundle
from pipeline.errors import UsageError
from pipeline.model import SaliencyModel, build_model
from pipeline.spec import BackboneSpec, MaskerSpec, ModelSpec

KEYS = {
    "format", "backbone", "masker", "preset", "input_size", "mask_size", "geometry", "mean", "std", "class_names",
    "data_classes", "class_index", "training", "metrics", "mask_statistics",
}  # fmt: skip


def a_spec(size: int = 64, classes: int = 3) -> ModelSpec:
    classifier = create_classifier("torchvision", "resnet18", outputs=classes, arguments={})
    taps = choose_taps(pyramid("torchvision", classifier, size), None)
    return ModelSpec(
        backbone=BackboneSpec(source="torchvision", name="resnet18", outputs=classes, taps=taps),
        masker=MaskerSpec(),
        preset="ca",
        input_size=size,
        mask_size=size // 4,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        class_names=[f"c{k}" for k in range(classes)],
        data_classes=[f"c{k}" for k in range(classes)],
        class_index=list(range(classes)),
    )


def a_model(spec: ModelSpec) -> SaliencyModel:
    torch.manual_seed(0)
    return build_model(spec).eval()


def test_round_trip(tmp_path: Path) -> None:
    spec = a_spec()
    model = a_model(spec)
    samples = np.random.default_rng(0).integers(0, 256, (300, 64, 64, 3), dtype=np.uint8)
    digest = save_bundle(tmp_path / "b", model, spec, samples)
    bundle = load_bundle(tmp_path / "b")
    assert bundle.sha256 == digest == bundle_sha256(tmp_path / "b")
    assert bundle.spec == spec
    assert bundle.samples is not None and np.array_equal(bundle.samples, samples[:256])
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for mine, theirs in zip(model(x), bundle.model(x), strict=True):
            assert torch.equal(mine, theirs)
    logits, mask = bundle.model(x)
    assert logits.shape == (2, 3) and mask.shape == (2, 1, 16, 16)
    assert float(mask.min()) >= 0 and float(mask.max()) <= 1
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "model.json",
        "model.safetensors",
        "samples.safetensors",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["b"], "no partial folder stays behind"


def test_the_keys_of_model_json_are_frozen(tmp_path: Path) -> None:
    spec = a_spec()
    save_bundle(tmp_path / "b", a_model(spec), spec)
    assert set(json.loads((tmp_path / "b/model.json").read_text())) == KEYS
    assert not (tmp_path / "b/samples.safetensors").exists()


def test_damage_is_named(tmp_path: Path) -> None:
    spec = a_spec()
    path = tmp_path / "b"
    with pytest.raises(UsageError, match="no such bundle"):
        load_bundle(path)
    save_bundle(path, a_model(spec), spec)
    text = (path / "model.json").read_text()
    (path / "model.json").write_text(text.replace("onepass-saliency/1", "onepass-saliency/9"))
    with pytest.raises(UsageError, match="format"):
        load_bundle(path)
    (path / "model.json").write_text(text[:100])
    with pytest.raises(UsageError, match=r"model\.json"):
        load_bundle(path)
    (path / "model.json").write_text(text)
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UsageError, match="do not fit"):
        load_bundle(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model\.safetensors is missing"):
        load_bundle(path)


def test_a_foreign_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/to-keep.txt").write_text("x")
    spec = a_spec()
    with pytest.raises(UsageError, match="no model bundle"):
        save_bundle(tmp_path / "letters", a_model(spec), spec)
    assert (tmp_path / "letters/to-keep.txt").exists()


def test_an_inconsistent_spec_is_refused() -> None:
    good = a_spec().model_dump()
    for change in ({"class_names": ["a"]}, {"class_index": [0, 1, 7]}, {"surprise": 1}):
        with pytest.raises(ValidationError):
            ModelSpec.model_validate(good | change)
