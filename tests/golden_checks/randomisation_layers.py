"""Section 5: the modules that the model-randomisation check goes through, for ResNet-50."""

from __future__ import annotations

import torch
from torchvision.models import resnet50

from pipeline.sanity_layers import randomisable_modules
from tests.golden_checks._golden import GoldenJson


def check(golden: GoldenJson) -> None:
    assert set(golden) >= {"1", "2", "3"}
    with torch.device("meta"):
        classifier = resnet50(weights=None)
    for depth in golden:
        assert randomisable_modules(classifier, int(depth)) == golden[depth], f"depth {depth}"
