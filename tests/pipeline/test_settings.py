"""Every variant of the study is a preset and its differences, and every one of them trains."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from pipeline.backbone import choose_taps, create_classifier, pyramid, tap_classifier
from pipeline.concrete import ConcreteHead
from pipeline.fakes import told_classes
from pipeline.fills import Blur, Zero, make_fill
from pipeline.masker import Masker
from pipeline.model import SaliencyModel, build_masker
from pipeline.objectives import KLPriorConfig, class_weights_of, side_loss
from pipeline.population import Population, PopulationConfig
from pipeline.presets import PRESETS, Preset
from pipeline.settings import configure
from pipeline.step import Batch, JointStep
from tests.pipeline.test_step import CLASSES, SIZE, a_batch, a_step, state

HINGES = ("mask_in=hinge", "mask_out=hinge", "price.rule=fixed", "masker.class_conditional=true")
PRIORS = ("mask_in=kl-prior", "mask_out=kl-prior")
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "masked-in only": ((), ("mask_out=none",)),
    "masked-out only": ((), ("mask_in=none",)),
    "entropy on both sides": ((), ("mask_in=entropy",)),
    "classification on both sides": ((), ("mask_out=classification",)),
    "kl to the prior": ((), ("mask_out=kl-prior",)),
    "kl the other way round": (("mask_out=kl-prior",), ("mask_out.kl=backward",)),
    "kl to the prior of the data": (PRIORS, ("mask_out.frequencies=data",)),
    "kl weighted by class": ((*PRIORS, "mask_out.frequencies=data"), ("mask_out.class_weight=true",)),
    "the other way round": (
        ("mask_out=classification",),
        ("mask_in.direction=minimize", "mask_out.direction=maximize"),
    ),
    "entropy the other way round": (
        ("mask_in=entropy",),
        ("mask_in.direction=maximize", "mask_out.direction=minimize"),
    ),
    "a fill": ((), ("fill=blur",)),
    "a fill on one side": (("fill=blur",), ("fill_sides=in",)),
    "target area": (("price.rule=fixed",), ("masker.target_area=true",)),
    "class-conditional": ((), ("masker.class_conditional=true",)),
    "gumbel, hard": ((), ("masker.concrete.mode=hard",)),
    "gumbel, soft": (("masker.concrete.mode=hard",), ("masker.concrete.mode=soft",)),
    "gumbel, learned temperature": (("masker.concrete.mode=soft",), ("masker.concrete.temperature=none",)),
    "no population": ((), ("population=none",)),
    "inert population": ((), ("population.inert=true",)),
    "as published": (("population.inert=true",), ("compat=published",)),
    "frozen": ((), ("classifier=frozen",)),
    "hinge": ((), ("mask_in=hinge", "mask_out=hinge")),
    "fake classes": (HINGES, ("fakes=0.5",)),
}
"""Name -> the settings of what it is a variant of, and its own."""


def step_for(preset: Preset) -> JointStep:
    torch.manual_seed(0)
    classifier = create_classifier("timm", "test_resnet", outputs=CLASSES, arguments={})
    maps = pyramid("timm", classifier, SIZE)
    backbone = tap_classifier("timm", classifier, choose_taps(maps, (0, 1, 2)), last_map=maps[-1].module)
    model = SaliencyModel(
        backbone=backbone, masker=build_masker(preset.masker, backbone, mask_size=8, classes=CLASSES)
    ).double()
    joint = preset.classifier == "joint"
    population = Population(config=preset.population, seed=0) if preset.population and joint else None
    fill = make_fill(preset.fill, preset.fill_options, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    weights = class_weights_of([0, 0, 0, 0, 1, 2, 2, 3], CLASSES)
    return a_step(model, preset, population, fill=fill, class_weights=weights)


def batch_for(preset: Preset) -> Batch:
    batch = a_batch()
    areas = torch.linspace(0.25, 0.75, 6, dtype=torch.float64)
    return batch._replace(areas=areas) if preset.masker.target_area else batch


@cache
def plain_masker() -> dict[str, torch.Tensor]:
    """The first weights of plain ``ca``."""
    return step_for(configure("ca", ())).model.masker.state_dict()


def begin_alike(masker: Masker) -> None:
    """Give ``masker`` the first weights of plain ``ca``; what it reads beside the maps begins with weights of 0."""
    with torch.no_grad():
        for name, value in masker.state_dict().items():
            theirs = plain_masker().get(name.replace("final.conv.", "final.0."))
            if theirs is not None:
                value.zero_()[tuple(slice(size) for size in theirs.shape)] = theirs


@cache
def course(settings: tuple[str, ...]) -> tuple[dict[str, torch.Tensor], bool]:
    """The masker's weights, those for its maps, after three steps of a variant of ``ca``, and whether the classifier moved.

    The last step is one that an earlier classifier judges, where there are any; the classifier moves fast, so that the
    earlier one is another.
    """
    preset = configure("ca", (*settings, "optimisation.classifier_rate=0.01"))
    step = step_for(preset)
    begin_alike(step.model.masker)
    before = state(step.model.backbone)
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        logs = step(
            batch_for(preset), step=number, divisor=6, phase="joint", course=0.5 + number / 10, generator=generator
        )
        assert all(value == value and abs(value) < 1e6 for value in logs.values()), logs
    plain, found = plain_masker(), {}
    for name, value in step.model.masker.state_dict().items():
        own = name.replace("final.conv.", "final.0.")
        if own in plain:
            found[own] = value[tuple(slice(size) for size in plain[own].shape)]
    parameters = dict(step.model.backbone.named_parameters())
    return found, any(not torch.equal(before[name], value) for name, value in parameters.items())


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in two)


def moved(step: JointStep, part: str, *, at: int = 1) -> bool:
    module = getattr(step.model, part)
    before = state(module)
    logs = step(
        batch_for(step.preset),
        step=at,
        divisor=6,
        phase="joint",
        course=0.5,
        generator=torch.Generator().manual_seed(3),
    )
    assert all(value == value and abs(value) < 1e6 for value in logs.values()), logs
    parameters = dict(module.named_parameters())
    return any(not torch.equal(before[name], value) for name, value in parameters.items())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_another_masker(name: str) -> None:
    """From the same weights, pictures and noise on: a setting that nothing reads would train the same one."""
    base, own = VARIANTS[name]
    masker, classifier_moved = course((*base, *own))
    assert distance(masker, course(base)[0]) > 1e-6
    assert classifier_moved == (configure("ca", (*base, *own)).classifier == "joint")


def test_a_setting_that_is_as_it_was_trains_the_same_masker() -> None:
    assert distance(course(())[0], course(("weight_in=1.0",))[0]) < 1e-12
    drawn = Population(config=PopulationConfig(), seed=0)
    drawn.snapshots = [{}]
    assert [drawn.draw(number) for number in range(3)] == [None, None, 0]


def test_wanted_areas_reach_the_loss() -> None:
    """The same masks, by a masker that does not yet heed what it is told, cost what they are away from what was wanted."""
    preset = configure("ca", ("masker.target_area=true", "price.rule=fixed", "population=none"))
    losses = []
    for wanted in (0.1, 0.9):
        step = step_for(preset)
        begin_alike(step.model.masker)
        batch = a_batch()._replace(areas=torch.full((6,), wanted, dtype=torch.float64))
        found = step.losses(batch, divisor=6, phase="joint", drawn=None).masker
        assert found is not None
        losses.append(found.item())
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize(
    "fill", ["zero", "colour", "black", "blur", "pyramid", "local-mean", "noise", "others", "random"]
)
def test_every_fill_trains(fill: str) -> None:
    settings = [f"fill={fill}", *(["fill_options.rgb=[0.2,0.4,0.6]"] if fill == "colour" else [])]
    assert moved(step_for(configure("fix", settings)), "masker")


def test_a_users_own_fill_trains(tmp_path: Path) -> None:
    class Half(torch.nn.Module):
        def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            return 0.5 * x

    torch.jit.save(torch.jit.script(Half()), tmp_path / "half.pt")
    assert moved(step_for(configure("fix", ["fill=user", f"fill_options.path={tmp_path / 'half.pt'}"])), "masker")


def test_the_fill_goes_to_its_side() -> None:
    fills = step_for(configure("fix", ["fill=blur", "fill_sides=out"])).fills
    assert isinstance(fills["in"], Zero) and isinstance(fills["out"], Blur)


def test_the_prior_of_the_data_is_how_often_its_classes_are() -> None:
    weights = class_weights_of([0, 0, 0, 2], 4)
    prior = (1 / weights) / (1 / weights).sum()
    torch.testing.assert_close(prior, torch.tensor([4.0, 1.0, 2.0, 1.0]) / 8)
    step = step_for(configure("ca", ["mask_out=kl-prior", "mask_out.frequencies=data"]))
    config, answer = step.preset.mask_out, torch.zeros(2, CLASSES, dtype=torch.float64)
    assert isinstance(config, KLPriorConfig)
    step.class_weights = torch.arange(1.0, CLASSES + 1)
    assert step._prior_weights(config, answer).tolist() == list(range(1, CLASSES + 1))
    assert set(step._prior_weights(replace(config, frequencies="uniform"), answer).tolist()) == {1.0}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_takes_a_step(name: str) -> None:
    step = step_for(PRESETS[name])
    assert moved(step, "masker")


def test_fakes_are_other_classes_of_the_data() -> None:
    labels = torch.tensor([0, 1, 3] * 200)
    told, fake = told_classes(labels, CLASSES, None, 0.5, torch.Generator().manual_seed(0))
    assert fake is not None and 250 < int(fake.sum()) < 350
    assert torch.equal(told[~fake], labels[~fake]) and bool((told != labels)[fake].all())
    assert set(told[fake].tolist()) == {0, 1, 2, 3}
    told, fake = told_classes(labels, CLASSES, torch.tensor([0, 1, 3]), 0.5, torch.Generator().manual_seed(0))
    assert fake is not None and set(told[fake].tolist()) == {0, 1, 3} and bool((told != labels)[fake].all())


def test_the_masker_is_told_the_wrong_class_and_judged_by_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_for(configure("dabkowski-gal", ["fakes=0.999"]))
    batch = a_batch()
    told: list[torch.Tensor] = []
    judged: list[tuple[torch.Tensor, torch.Tensor]] = []
    masker = step.model.masker.forward
    monkeypatch.setattr(step.model.masker, "forward", lambda *a, **k: told.append(k["labels"]) or masker(*a, **k))
    monkeypatch.setattr(
        "pipeline.step.side_loss", lambda *a, **k: judged.append((k["labels"], k["flipped"])) or side_loss(*a, **k)
    )
    step.losses(batch, divisor=6, phase="joint", drawn=None, generator=torch.Generator().manual_seed(3))
    assert bool((told[0] != batch.labels).all()) and len(judged) == 2
    assert all(torch.equal(labels, batch.labels) and bool(fake.all()) for labels, fake in judged)


def test_data_of_one_class_has_no_wrong_one() -> None:
    labels = torch.tensor([2, 2])
    told, fake = told_classes(labels, CLASSES, torch.tensor([2]), 0.25, None)
    assert fake is None and torch.equal(told, labels)


def test_same_generator_same_step() -> None:
    preset = configure("fix", ["masker.concrete.mode=hard", "fill=noise"])
    one, two = step_for(preset), step_for(preset)
    assert moved(one, "masker") and moved(two, "masker")
    for name, value in state(one.model.masker).items():
        assert torch.equal(value, state(two.model.masker)[name]), name


def test_a_concrete_head_knows_how_far_the_training_is() -> None:
    step = step_for(configure("fix", ["masker.concrete.mode=hard"]))
    head, batch = step.model.masker.final, a_batch()
    assert isinstance(head, ConcreteHead)
    for course in (0.0, 0.3):
        step(batch, step=1, divisor=6, phase="joint", course=course, generator=torch.Generator().manual_seed(3))
        assert head.course == course


def test_an_inert_population_only_spares_the_classifier() -> None:
    """At a drawn step the inert population judges with the current classifier, and the classifier learns clean pictures only."""
    settings = ("population.inert=true", "population.probability=1", "weight_blank=0")
    inert, none = step_for(configure("ca", settings)), step_for(configure("ca", ("population=none", "weight_blank=0")))
    assert inert.population is not None
    inert.population.observe(0, inert.model.backbone)
    with torch.no_grad():
        next(iter(inert.population.snapshots))["extractor.conv1.0.weight"].zero_()
    batch = a_batch()
    asked = inert.losses(batch, divisor=6, phase="joint", drawn=0)
    plain = none.losses(batch, divisor=6, phase="joint", drawn=None)
    assert asked.masker is not None and plain.masker is not None and asked.classifier is not None
    assert asked.masker.item() == pytest.approx(plain.masker.item(), rel=1e-12)
    assert asked.classifier.item() == pytest.approx(float(asked.logs["clean_loss"]), rel=1e-12)


def test_as_published_the_classifier_moves_before_it_judges() -> None:
    """The masker's gradient is the one under a classifier that has taken its clean step already."""
    settings = ("compat=published", "population=none", "first_masks=published")
    step = step_for(configure("ca", settings))
    batch = a_batch()
    first = step_for(configure("ca", settings))
    clean = first.clean(batch, divisor=6, phase="joint")
    first._set_rates("joint", 0.5)
    from pipeline.step import Losses

    first._apply(
        first.classifier_optimiser, first.classifier_parameters, first.gradients(Losses(None, clean.loss, {}))[1]
    )
    expected = first.masked(
        batch, clean._replace(loss=clean.loss.detach(), logits=clean.logits.detach()), divisor=6, drawn=None
    )
    logs = step(batch, step=1, divisor=6, phase="joint", course=0.5)
    assert expected.masker is not None
    assert logs["masker_loss"] == pytest.approx(expected.masker.item(), rel=1e-9)
    plain = step_for(configure("ca", ("population=none", "weight_blank=0")))(
        batch, step=1, divisor=6, phase="joint", course=0.5
    )
    assert logs["masker_loss"] != pytest.approx(plain["masker_loss"], rel=1e-6)
