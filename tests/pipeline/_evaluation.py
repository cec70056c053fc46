"""A small model and a small data set that the tests of evaluation and report share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.backbone import choose_taps, create_classifier, pyramid
from pipeline.bundle import Bundle
from pipeline.data.planted import KINDS, write_planted
from pipeline.model import build_model
from pipeline.spec import BackboneSpec, MaskerSpec, ModelSpec

SIZE = 64


def untrained_bundle(path: Path, *, outputs: int | None = None, geometry: str = "squash", **masker: Any) -> Bundle:
    """A ResNet-18 with random weights for the classes of the planted set, in memory.

    ``outputs``: a larger head, in which data class k is logit ``outputs - 1 - k``.  ``masker``: of its `MaskerSpec`.
    """
    torch.manual_seed(0)
    classes = sorted(KINDS)
    count = outputs or len(classes)
    index = [count - 1 - k for k in range(len(classes))] if outputs else list(range(count))
    names = [f"other {k}" for k in range(count)]
    for name, k in zip(classes, index, strict=True):
        names[k] = name
    classifier = create_classifier("torchvision", "resnet18", outputs=count, arguments={})
    spec = ModelSpec.model_validate(
        {
            "backbone": BackboneSpec(
                source="torchvision",
                name="resnet18",
                outputs=count,
                taps=choose_taps(pyramid("torchvision", classifier, SIZE), None),
            ),
            "masker": MaskerSpec(**masker),
            "preset": "fix",
            "input_size": SIZE,
            "mask_size": SIZE // 4,
            "geometry": geometry,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "class_names": names,
            "data_classes": classes,
            "class_index": index,
        }
    )
    return Bundle(path=path, spec=spec, model=build_model(spec).eval(), samples=None, sha256="")


def planted_data(root: Path, *, per_class: int = 2) -> Path:
    """A validation split of the planted set."""
    write_planted(root, seed=0, size=SIZE, per_class_train=0, per_class_val=per_class)
    return root
