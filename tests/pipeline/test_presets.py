"""The named methods and the rules by which they transfer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.blank import blank_answer, unit_of
from pipeline.fills import FILLS
from pipeline.presets import PRESETS
from tests.pipeline.test_step import SIZE, a_batch, a_model, a_step


def test_what_the_presets_are() -> None:
    assert all(preset.name == name for name, preset in PRESETS.items())
    for preset in (PRESETS["ca"], PRESETS["fix"]):
        assert preset.mask_in is not None and preset.mask_in.objective == "classification"
        assert preset.mask_out is not None and preset.mask_out.objective == "entropy"
        assert preset.fill in FILLS
        assert preset.price.rule == "entropy" and preset.relative_units
        assert preset.mask_out.lambda_area == 10 * preset.mask_in.lambda_area, "the paper's proportion"
    assert PRESETS["fix"].classifier == "frozen" and PRESETS["fix"].population is None
    assert PRESETS["ca"].classifier == "joint" and PRESETS["ca"].population is not None


def test_the_unit_is_what_a_blank_picture_says() -> None:
    step = a_step(a_model(), PRESETS["fix"])
    judge = step.model.backbone.eval()
    q = judge(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64)).logits.softmax(1)
    entropy = (-(q * q.log()).sum()).item()
    assert unit_of(blank_answer(judge, step.blank)).item() == pytest.approx(
        max(entropy, 0.25 * torch.tensor(4.0).log().item())
    )
    head = step.model.backbone.head
    assert head is not None
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([50.0, 0, 0, 0]))  # a classifier that is sure of nothing at all
    assert unit_of(blank_answer(judge, step.blank)).item() == pytest.approx(0.25 * torch.tensor(4.0).log().item())


def test_relative_units_do_not_depend_on_the_scale_of_the_answers() -> None:
    """With uniform answers everywhere the masked-out objective is -1 in units, however many classes there are."""
    step = a_step(a_model(), replace(PRESETS["fix"], mask_in=None))
    head = step.model.backbone.head
    assert head is not None
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    batch = a_batch()
    labels = torch.zeros_like(batch.labels)  # arg max of equal logits: all pictures count as right
    losses = step.losses(batch._replace(labels=labels), divisor=6, phase="joint", drawn=None)
    assert losses.masker is not None
    step_tv_free = float(losses.logs["hidden"])
    assert step_tv_free == pytest.approx(1.0)
