"""Masks begin soft and at half the picture, once, whatever the initial weights give."""

from __future__ import annotations

import copy

import pytest
import torch

from pipeline.first_masks import even_out
from pipeline.model import SaliencyModel, build_masker
from pipeline.presets import PRESETS
from pipeline.spec import MaskerSpec
from tests.pipeline.test_step import CLASSES, a_batch, a_model, a_step, state


def with_masker(spec: MaskerSpec) -> SaliencyModel:
    model = a_model()
    masker = build_masker(spec, model.backbone, mask_size=8, classes=CLASSES)
    return SaliencyModel(backbone=model.backbone, masker=masker.double())


SPECS = {
    "plain": MaskerSpec(),
    "area": MaskerSpec(target_area=True),
    "class": MaskerSpec(class_conditional=True),
    "concrete": MaskerSpec(concrete={"mode": "hard", "temperature": 0.1}),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_logits_have_mean_0_and_deviation_1(spec: MaskerSpec) -> None:
    model, batch = with_masker(spec).eval(), a_batch()
    with torch.no_grad():
        maps = model.backbone(batch.images).features
    inputs = {
        "target_area": torch.linspace(0.2, 0.8, 6).double() if spec.target_area else None,
        "labels": batch.labels if spec.class_conditional else None,
    }
    before = state(model.masker)
    shape = copy.deepcopy(model.masker).train()(maps, **inputs)
    assert abs(float(shape.mean())) > 0.5 or abs(float(shape.std()) - 1) > 0.5, "there is something to mend"
    even_out(model, batch.images, areas=inputs["target_area"], labels=batch.labels)
    changed = {name for name, value in model.masker.state_dict().items() if not torch.equal(value, before[name])}
    last = next(name for name, module in model.masker.named_modules() if module is model.masker.last)
    assert changed == {f"{last}.weight", f"{last}.bias"}
    logits = model.masker.train()(maps, **inputs)
    assert float(logits.mean()) == pytest.approx(0, abs=1e-9)
    assert float(logits.std(correction=0)) == pytest.approx(1, abs=1e-9)
    assert torch.allclose(logits, (shape - shape.mean()) / shape.std(correction=0)), "the same picture, only softer"


def test_a_flat_masker_stays_finite() -> None:
    model = a_model()
    torch.nn.init.zeros_(model.masker.last.weight)
    even_out(model, a_batch().images)
    assert not model.masker.last.weight.any()


def test_a_step_does_it_once_and_not_for_published_presets() -> None:
    model, batch = a_model(), a_batch()
    seen: list[float] = []

    def areas(step, **words) -> float:
        seen.append(step(batch, step=0, divisor=6, phase="joint", course=0.5, **words)["mask_mean"])
        return seen[-1]

    with torch.no_grad():
        model.masker.last.bias.fill_(-20.0)
    assert areas(a_step(copy.deepcopy(model), PRESETS["paper-fix"])) < 0.3
    step = a_step(model, PRESETS["fix"])
    assert areas(step) == pytest.approx(0.5, abs=0.1)
    with torch.no_grad():
        model.masker.last.bias.fill_(-20.0)
    assert areas(step) < 0.01, "a masker that has learnt is left alone"
    resumed = a_step(model, PRESETS["fix"])
    resumed.masker_optimiser.load_state_dict(step.masker_optimiser.state_dict())
    assert areas(resumed) < 0.01, "and so is one that comes from a checkpoint"
