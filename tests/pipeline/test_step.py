"""The joint step: gradients first, the population really used, the frozen classifier really frozen."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.area_price import RESCUE, AreaPriceConfig, Price, next_price
from pipeline.backbone import choose_taps, create_classifier, pyramid, tap_classifier
from pipeline.fills import Zero
from pipeline.masking import mask_in, mask_out, upsample
from pipeline.model import SaliencyModel, build_masker
from pipeline.objectives import SideConfig, side_loss
from pipeline.population import Population, PopulationConfig
from pipeline.presets import PRESETS, Preset
from pipeline.spec import MaskerSpec
from pipeline.step import Batch, JointStep

SIZE, CLASSES = 32, 4


def a_model() -> SaliencyModel:
    torch.manual_seed(0)
    classifier = create_classifier("torchvision", "resnet18", outputs=CLASSES, arguments={})
    maps = pyramid("torchvision", classifier, SIZE)
    backbone = tap_classifier("torchvision", classifier, choose_taps(maps, (1, 2)), last_map=maps[-1].module)
    masker = build_masker(MaskerSpec(), backbone, mask_size=8, classes=CLASSES)
    return SaliencyModel(backbone=backbone, masker=masker).double()


def a_step(model: SaliencyModel, preset: Preset, population: Population | None = None, **changes) -> JointStep:
    options = {
        "model": model,
        "preset": preset,
        "fill": Zero(),
        "blank": torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64),
        "population": population,
        "batchnorm": "eval",
        "trains_classifier": preset.classifier == "joint",
        "scratch": False,
    }
    return JointStep(**(options | changes))


def a_batch(seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    labels = torch.from_numpy(random.integers(0, CLASSES, 6))
    return Batch(torch.from_numpy(random.standard_normal((6, 3, SIZE, SIZE))), labels)


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def test_gradients_are_those_of_the_equations() -> None:
    """The published loss, written out by hand, with the step's gradients from before any update."""
    model = a_model()
    fixed = AreaPriceConfig(rule="fixed", initial=3.0)
    preset = replace(PRESETS["ca"], relative_units=False, price=fixed)
    step = a_step(model, preset)
    batch = a_batch()
    losses = step.losses(batch, divisor=6, phase="joint", drawn=None)
    masker_gradients, classifier_gradients = step.gradients(losses)

    model.backbone.eval()
    logits, features = model.backbone(batch.images)
    native = torch.sigmoid(model.masker({k: v.detach() for k, v in features.items()}))
    mask = upsample(native, (SIZE, SIZE))
    total, classifier = torch.zeros((), dtype=torch.float64), F.cross_entropy(logits, batch.labels)
    for config, masked in (
        (preset.mask_in, mask_in(batch.images, mask)),
        (preset.mask_out, mask_out(batch.images, mask)),
    ):
        assert config is not None
        z = model.backbone(masked).logits
        total = (
            total
            + side_loss(
                replace(config, lambda_area=3.0 * config.lambda_area),
                mask=mask,
                logits_masked=z,
                logits_clean=logits.detach(),
                labels=batch.labels,
            ).total
        )
        classifier = classifier + F.cross_entropy(z, batch.labels)
    blank = F.log_softmax(model.backbone(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64)).logits, 1)
    classifier = classifier - preset.weight_blank * blank.mean()
    expected = torch.autograd.grad(total, list(model.masker.parameters()), retain_graph=True)
    for mine, theirs in zip(masker_gradients, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-9)
    expected = torch.autograd.grad(classifier, list(model.backbone.parameters()), allow_unused=True)
    for mine, theirs in zip(classifier_gradients, expected, strict=True):
        assert torch.allclose(mine, torch.zeros_like(mine) if theirs is None else theirs, atol=1e-9)


def test_a_blank_picture_may_be_any_class_of_the_data() -> None:
    """Outputs that the data has no pictures of take no part, and a frozen classifier is not asked to learn it."""
    model = a_model()
    batch = a_batch()
    losses = {}
    for weight in (0.0, 2.0):
        step = a_step(model, replace(PRESETS["ca"], weight_blank=weight), classes=(2, 0, 2))
        losses[weight] = step.clean(batch, divisor=6, phase="joint").loss.item()
    blank = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64)
    log_q = F.log_softmax(model.backbone.eval()(blank).logits.detach(), 1)[0]
    assert losses[2.0] - losses[0.0] == pytest.approx(-2.0 * float(log_q[[0, 2]].mean()))
    frozen = a_step(model, replace(PRESETS["fix"], weight_blank=2.0))
    assert frozen.clean(batch, divisor=6, phase="joint").loss.item() == pytest.approx(losses[0.0])


def test_fix_leaves_the_classifier_alone() -> None:
    model = a_model()
    before, masker_before = state(model.backbone), state(model.masker)
    step = a_step(model, PRESETS["fix"])
    for number in range(3):
        step(a_batch(number), step=number, divisor=6, phase="joint", course=0.1)
    after = model.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "statistics of BatchNorm included"
    assert not all(torch.equal(v, model.masker.state_dict()[k]) for k, v in masker_before.items())
    assert all(p.grad is None for p in model.backbone.parameters())


def test_ca_moves_both_and_masked_pictures_leave_the_statistics_alone() -> None:
    model = a_model()
    step = a_step(model, PRESETS["ca"], batchnorm="train")
    twin = copy.deepcopy(model)
    batch = a_batch()
    step(batch, step=0, divisor=6, phase="joint", course=0.1)
    twin.backbone.train()
    twin.backbone(batch.images)  # the clean pass alone
    name = "extractor.bn1.running_mean"
    assert torch.allclose(model.backbone.state_dict()[name], twin.backbone.state_dict()[name])
    assert not torch.equal(
        model.backbone.state_dict()["extractor.conv1.weight"], twin.backbone.state_dict()["extractor.conv1.weight"]
    )


@pytest.mark.parametrize("own", [True, False])
def test_a_drawn_classifier_judges_the_masks(own: bool) -> None:
    """With the population in use, the masker's loss is that of the drawn state and not of the current one."""
    model = a_model()
    population = Population(config=PopulationConfig(probability=1.0, save_every=1, size=1, own_clean=own), seed=0)
    fixed = AreaPriceConfig(rule="fixed", initial=3.0)
    preset = replace(PRESETS["ca"], weight_blank=0.0, relative_units=False, price=fixed)
    step = a_step(model, preset, population)
    population.observe(0, model.backbone)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(1.3)  # the current classifier moves away from the snapshot
    batch = a_batch()
    current = step.losses(batch, divisor=6, phase="joint", drawn=None)
    drawn = step.losses(batch, divisor=6, phase="joint", drawn=population.draw(5))
    assert float(current.logs["mask_mean"]) == float(drawn.logs["mask_mean"])
    assert current.masker is not None and drawn.masker is not None
    assert current.masker.item() != drawn.masker.item()
    logits, features = model.backbone.eval()(batch.images)
    mask = upsample(torch.sigmoid(model.masker({k: v.detach() for k, v in features.items()})), (SIZE, SIZE))
    judge = population.network(0, model.backbone)
    whole = (judge if own else model.backbone)(batch.images).logits  # by which a picture counts as recognised
    assert float(drawn.logs["judge_right"]) == pytest.approx(float((whole.argmax(1) == batch.labels).double().mean()))
    total = torch.zeros((), dtype=torch.float64)
    for config, masked in ((preset.mask_in, mask_in), (preset.mask_out, mask_out)):
        assert isinstance(config, SideConfig)
        answer = judge(masked(batch.images, mask)).logits
        config = replace(config, lambda_area=3.0 * config.lambda_area)
        total = (
            total + side_loss(config, mask=mask, logits_masked=answer, logits_clean=whole, labels=batch.labels).total
        )
        if config.side == "in":
            right = answer.argmax(1) == batch.labels
            assert float(drawn.logs["in_right"]) == pytest.approx(float(right.double().mean()))
    assert drawn.masker.item() == pytest.approx(total.item())
    # and the classifier is then trained on the clean pictures alone
    assert drawn.classifier is not None
    assert float(drawn.classifier) == pytest.approx(float(F.cross_entropy(logits, batch.labels)))


def test_population_draws_depend_on_seed_and_step_alone() -> None:
    network = torch.nn.Linear(2, 2)

    def filled(seed: int) -> Population:
        population = Population(config=PopulationConfig(probability=0.5, save_every=2, size=3), seed=seed)
        for step in range(20):
            with torch.no_grad():
                network.weight.fill_(step)
            population.observe(step, network)
        return population

    one, two, other = filled(0), filled(0), filled(1)
    assert len(one.snapshots) == 3
    draws = [one.draw(step) for step in range(200)]
    assert draws == [two.draw(step) for step in range(200)]
    assert draws != [other.draw(step) for step in range(200)]
    used = [draw for draw in draws if draw is not None]
    assert 60 < len(used) < 140 and set(used) == {0, 1, 2}
    for a, b in zip(one.snapshots, two.snapshots, strict=True):
        assert torch.equal(a["weight"], b["weight"])
    restored = Population(config=one.config, seed=0)
    assert one.taken == two.taken and [int(s["weight"].flatten()[0]) for s in one.snapshots] == one.taken
    restored.restore(one.state())
    assert restored.taken == one.taken
    assert torch.equal(restored.network(1, network).weight, one.snapshots[1]["weight"])


def test_the_price_is_told_what_the_step_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leak is a picture recognised whole and masked-out, unless a blank one is taken for its class."""
    model, batch = a_model(), a_batch()
    preset = replace(PRESETS["ca"], first_masks="published")
    step = a_step(model, preset, scratch=True)
    told: list[dict] = []
    monkeypatch.setattr("pipeline.step.next_price", lambda *a, **k: told.append(k) or next_price(*a, **k))
    with torch.no_grad():
        logits, features = model.backbone.eval()(batch.images)
        mask = upsample(torch.sigmoid(model.masker({k: v.detach() for k, v in features.items()})), (SIZE, SIZE))
        nothing = int(model.backbone(step.blank).logits.argmax())
        left = model.backbone(mask_out(batch.images, mask)).logits.argmax(1)
    labels = left.clone()
    labels[0] = (left[0] + 1) % CLASSES
    batch = batch._replace(labels=labels)
    right = logits.argmax(1) == labels
    leaks = right & (left == labels) & (labels != nothing)
    for course in (0.1, 0.3):
        twin = copy.deepcopy(model)
        a_step(twin, preset, scratch=True)(batch, step=0, divisor=6, phase="joint", course=course)
    assert [seen["settling"] for seen in told] == [True, False]
    assert told[0]["leak"] == pytest.approx(float(leaks.sum() / max(1, int(right.sum()))))
    assert told[0]["mean_area"] == pytest.approx(float(mask.mean()), abs=1e-3)


def test_masks_that_follow_slowly_do_not_swing() -> None:
    """Against a mask that grows and shrinks some steps behind its price, as maskers do, the price comes to rest."""
    config = AreaPriceConfig(rule="entropy", target=0.7, sufficiency=0.8, initial=2.5, lowest=2.5)
    area, drift, price, areas = 0.9, 0.0, Price(2.5, 2.5), []
    for _ in range(600):
        drift += (0.012 * math.log(4.0 / price.charged) - drift) / 15  # 4 is what this area costs at rest
        area = min(max(area + drift, 0.01), 1.0)
        price = next_price(config, price, entropy_share=0.4 + 0.6 * area, leak=None, sufficiency=1.0, mean_area=area)
        areas.append(area)
    assert max(areas[300:]) - min(areas[300:]) < 0.02 and areas[-1] == pytest.approx(0.5, abs=0.02)


def test_the_price_holds_what_it_is_told_to_hold() -> None:
    config = AreaPriceConfig(rule="entropy", target=0.8, sufficiency=0.8, initial=4.0)
    start = Price(4.0, 4.0)

    def moved(hidden: float | None, shown: float | None, area: float, **changes) -> Price:
        step = {name: changes.pop(name) for name in ("leak", "settling") if name in changes}
        seen = {"entropy_share": hidden, "leak": None, "sufficiency": shown, "mean_area": area}
        return next_price(replace(config, **changes), start, **(seen | step))  # pyright: ignore[reportArgumentType]

    def charged(*figures, **changes) -> float:
        return moved(*figures, **changes).charged

    dearer = moved(0.9, 1.0, 0.5)
    assert 4.0 < dearer.held < dearer.charged, "hides more than asked and shows enough: area gets dearer"
    assert dearer.charged == pytest.approx(dearer.held * math.exp(config.response * 0.1))
    assert charged(0.7, 1.0, 0.5) < 4.0, "hides too little"
    assert charged(0.9, 0.6, 0.5) < 4.0, "shows too little"
    assert charged(0.9, 1.0, 0.5, leak=0.4) > 4.0 > charged(0.9, 1.0, 0.5, leak=0.4, largest_leak=0.3), "gives it away"
    assert charged(0.9, None, 0.5) > 4.0 > charged(None, 0.6, 0.5), "with one side only, that side decides"
    assert charged(0.1, 1.0, 0.5) == config.lowest, "never below the published weight ..."
    assert charged(0.99, 1.0, 0.01) == charged(0.99, 1.0, 0.01, response=0.0) == RESCUE, "... but to bring masks back"
    lenient = charged(0.1, 0.2, 0.5)
    assert lenient == pytest.approx(config.lowest * math.exp(-config.response * 0.2)), "... but to show more"
    assert charged(0.1, 0.2, 0.5, leak=0.5, largest_leak=0.3) == pytest.approx(
        lenient * math.exp(-config.response * 0.2)
    )
    assert moved(0.1, 0.2, 0.5).held < 4.0 and moved(0.1, 0.2, 0.5, lowest=4.0).held == 4.0, (
        "which is forgotten at once"
    )
    assert charged(0.1, 0.1, 0.9) > 4.0 > charged(0.1, 0.6, 0.8), "masks of everything could not come back"
    assert charged(0.99, 0.1, 0.6, settling=True) > 4.0 > charged(0.1, 1.0, 0.4, settling=True), "half at first"
    assert moved(1e6, 1e6, 0.5) == moved(2.0, 2.0, 0.5), "a step with no picture recognised is one step like others"
    assert moved(0.9, 0.5, 0.5, rule="fixed") == start
    assert charged(1.0, 1.0, 1.0, highest=4.5) == 4.5
    assert charged(0.0, 0.0, 0.5, rule="area", target=0.3) > 4.0
    for wrong in (
        {"rule": "magic"}, {"target": 1.5}, {"initial": 0.0}, {"response": -1.0}, {"settling": 1.0}, {"largest_area": 0.03},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="area price"):
            AreaPriceConfig(**wrong)
