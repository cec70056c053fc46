"""The masker beyond its recorded values: other sizes, layers and inputs; the concrete head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.concrete import ConcreteConfig, ConcreteHead
from pipeline.masker import Masker, default_mask_size


def maps(taps: dict[int, int], *, count: int = 2, finest: int = 12) -> dict[int, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {i: torch.rand(count, c, *(2 * [max(finest >> i, 1)]), generator=g) for i, c in taps.items()}


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"taps": {3: 1024, 4: 2048}}, 198_017),
        ({"taps": {0: 64, 1: 256, 2: 512, 3: 1024, 4: 2048}}, 249_153),
        ({"taps": {1: 256, 2: 512, 3: 1024, 4: 2048}}, 248_577),
        ({"taps": {2: 512, 3: 1024, 4: 2048}}, 231_489),
        ({"taps": {4: 2048}}, 131_777),
        ({"taps": {3: 1024}}, 66_241),
        ({"taps": {0: 64, 1: 256}}, 17_665),
        ({"taps": {0: 64}}, 4_801),
        ({"taps": {1: 256, 2: 512, 3: 1024, 4: 2048}, "target_area": True}, 248_833),
        ({"taps": {3: 1024, 4: 2048}, "class_count": 1000}, 270_209),
    ],
)
def test_parameters_are_those_of_the_papers_table(options: dict[str, Any], parameters: int) -> None:
    assert sum(p.numel() for p in Masker(mask_size=(56, 56), **options).parameters()) == parameters


@pytest.mark.parametrize("size", [(7, 7), (12, 20), (30, 16)])
def test_any_mask_size(size: tuple[int, int]) -> None:
    taps = {1: 5, 2: 6}
    logits = Masker(taps=taps, mask_size=size)(maps(taps))
    assert logits.shape == (2, 1, *size)


def test_a_quarter_of_the_input_is_the_default_size() -> None:
    assert [default_mask_size(s) for s in (224, 192, 64, 30)] == [56, 48, 16, 8]


@pytest.mark.parametrize("taps", [{0: 64}, {0: 64, 1: 5}, {0: 7, 1: 5}], ids=str)
@pytest.mark.parametrize("raw_first", [None, True, False])
def test_conditions_reach_the_mask_with_layer_0_as_well(taps: dict[int, int], raw_first: bool | None) -> None:
    masker = Masker(taps=taps, mask_size=(12, 12), target_area=True, class_count=3, raw_first=raw_first).eval()
    features = maps(taps)
    areas, labels = torch.tensor([0.3, 0.6]), torch.tensor([0, 2])
    logits = masker(features, target_area=areas, labels=labels)
    assert logits.shape == (2, 1, 12, 12)
    for other in (
        masker(features, target_area=areas + 0.1, labels=labels),
        masker(features, target_area=areas, labels=torch.tensor([1, 1])),
    ):
        assert ((other - logits).abs().amax((1, 2, 3)) > 1e-4).all()


def test_layer_0_is_taken_as_it_is_only_among_others_and_at_full_width() -> None:
    def names(taps: dict[int, int], raw_first: bool | None = None) -> set[str]:
        return {
            name.split(".")[0] for name, _ in Masker(taps=taps, mask_size=(8, 8), raw_first=raw_first).named_modules()
        }

    assert "conv1x1_0" in names({0: 64})
    assert "conv1x1_0" not in names({0: 64, 1: 5})
    assert "conv1x1_0" in names({0: 24, 1: 5})
    assert "conv1x1_0" in names({0: 64, 1: 5}, raw_first=False)
    assert "conv1x1_0" not in names({0: 24, 1: 5}, raw_first=True)


def test_conditions_must_be_passed_where_they_belong() -> None:
    taps = {1: 5}
    plain, conditioned = Masker(taps=taps, mask_size=(6, 6)), Masker(taps=taps, mask_size=(6, 6), target_area=True)
    with pytest.raises(ValueError, match="target_area must be passed"):
        conditioned(maps(taps))
    with pytest.raises(ValueError, match="target_area must be passed"):
        plain(maps(taps), target_area=torch.ones(2))
    with pytest.raises(ValueError, match="labels must be passed"):
        plain(maps(taps), labels=torch.ones(2, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one"):
        Masker(taps={}, mask_size=(6, 6))


def test_initialisation_is_the_published_one() -> None:
    torch.manual_seed(0)
    masker = Masker(taps={3: 1024, 4: 2048}, mask_size=(56, 56))
    state = masker.state_dict()
    assert state["conv1x1_4.0.weight"].std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.02)
    assert state["final.0.weight"].std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.1)
    assert (state["conv1x1_3.1.weight"] == 1).all() and (state["conv1x1_3.1.bias"] == 0).all()


def test_the_norm_is_the_callers() -> None:
    masker = Masker(taps={1: 5, 2: 6}, mask_size=(6, 6), norm=lambda channels: nn.GroupNorm(4, channels))
    assert sum(isinstance(m, nn.GroupNorm) for m in masker.modules()) == 2
    assert not any(isinstance(m, nn.BatchNorm2d) for m in masker.modules())


def concrete(mode: str, temperature: float | None = 0.1, shown: str = "mean") -> Masker:
    torch.manual_seed(0)
    config = ConcreteConfig(mode=mode, temperature=temperature, shown=shown)  # pyright: ignore[reportArgumentType]
    return Masker(taps={1: 5}, mask_size=(6, 6), concrete=config)


def test_hard_masks_are_zero_or_one_and_carry_a_gradient() -> None:
    masker = concrete("hard", shown="mode").train()
    logits = masker(maps({1: 5}))
    first, again, other = (masker.masks(logits, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert set(first.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(first, again) and not torch.equal(first, other)
    first.sum().backward()
    weight = masker.get_parameter("final.conv.weight")
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    assert torch.equal(masker.eval().masks(logits), (logits > 0).float())


def test_samples_follow_the_logits() -> None:
    head = ConcreteHead(3, ConcreteConfig()).train()
    logits = torch.tensor([-2.0, 0.0, 1.0]).repeat(20_000, 1)
    share = head.masks(logits, torch.Generator().manual_seed(0)).mean(0)
    torch.testing.assert_close(share, torch.sigmoid(logits[0]), atol=0.02, rtol=0)


def test_modes_without_noise() -> None:
    logits = torch.linspace(-3, 3, 7)
    for mode, expected in (("sigmoid", torch.sigmoid(logits)), ("logits", logits)):
        for training in (True, False):
            assert torch.equal(concrete(mode).train(training).masks(logits), expected)
    published = concrete("soft", 0.5, "mode").eval().masks(logits)
    torch.testing.assert_close(published, torch.sigmoid(2 * logits))


@pytest.mark.parametrize(("mode", "temperature"), [("hard", 0.1), ("soft", 0.1), ("soft", 0.5), ("soft", 1.0)])
def test_a_trained_head_shows_what_its_samples_show_on_average(mode: str, temperature: float) -> None:
    """So that masks have the area that they paid for: with every logit below 0 the likelier value is 0 everywhere."""
    masker = concrete(mode, temperature)
    logits = torch.linspace(-4, -0.5, 8)
    samples = masker.train().masks(logits.repeat(40_000, 1), torch.Generator().manual_seed(0)).mean(0)
    torch.testing.assert_close(masker.eval().masks(logits), samples, atol=0.01, rtol=0)
    assert not concrete("hard", shown="mode").eval().masks(logits).any()


def test_only_the_likelier_values_of_hard_masks_are_binary() -> None:
    for config in (ConcreteConfig(), ConcreteConfig(mode="soft", shown="mode"), ConcreteConfig(mode="sigmoid")):
        assert not config.binary
    assert ConcreteConfig(shown="mode").binary


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("temperature", [0.1, None])
def test_the_noise_and_the_hardness_come_in_slowly(mode: str, temperature: float | None) -> None:
    head = concrete(mode, temperature).train().final
    assert isinstance(head, ConcreteHead)
    logits = torch.linspace(-3, 3, 7, requires_grad=True)

    def at(course: float, seed: int = 0) -> Tensor:
        head.course = course
        return head.masks(logits, torch.Generator().manual_seed(seed))

    torch.testing.assert_close(at(0.0), torch.sigmoid(logits))  # the plain masker, gradient included
    (gradient,) = torch.autograd.grad(at(0.0).sum(), logits)
    torch.testing.assert_close(gradient, torch.sigmoid(logits) * (1 - torch.sigmoid(logits)))
    spreads = [float((at(course) - at(course, 1)).detach().abs().mean()) for course in (0.0, 0.2, 0.4, 0.75)]
    assert spreads == sorted(spreads) and spreads[0] == 0 and spreads[2] > 0
    assert torch.equal(at(0.75), at(1.0)), "from there on it is the distribution itself"
    between = at(0.4)
    assert bool((between > 0).all() and (between < 1).all())
    if mode == "hard":
        assert set(at(0.75).unique().tolist()) <= {0.0, 1.0}


def test_as_published_the_noise_is_there_from_the_start() -> None:
    head = ConcreteHead(3, ConcreteConfig(anneal=0.0)).train()
    head.course = 0.0
    assert set(head.masks(torch.zeros(50), torch.Generator().manual_seed(0)).unique().tolist()) == {0.0, 1.0}


def test_a_learned_temperature_starts_at_a_tenth_and_learns() -> None:
    masker = concrete("soft", None).train()
    tau = masker.get_parameter("final.tau")
    assert tau.item() == pytest.approx(0.1)
    masker.masks(masker(maps({1: 5})), torch.Generator().manual_seed(0)).sum().backward()
    assert tau.grad is not None and tau.grad != 0


def test_a_learned_temperature_that_falls_below_0_still_gives_masks() -> None:
    head = ConcreteHead(3, ConcreteConfig(mode="soft", temperature=None)).train()
    assert head.tau is not None
    head.tau.data.fill_(-0.1)
    for course in (0.3, 1.0):
        head.course = course
        masks = head.masks(torch.linspace(-2, 2, 50), torch.Generator().manual_seed(0))
        assert bool(masks.isfinite().all()) and masks[-1] > masks[0], "and not the wrong way round"


@pytest.mark.parametrize(
    "options", [{"mode": "firm"}, {"temperature": 0.0}, {"temperature": -1.0}, {"anneal": 1.5}, {"shown": "best"}]
)
def test_wrong_concrete_settings_are_quoted(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        ConcreteConfig(**options)


@pytest.mark.parametrize(
    "taps, options",
    [
        ({3: 7, 4: 9}, {}),
        ({0: 24, 1: 5, 4: 6}, {"raw_first": True}),
        ({0: 64, 2: 6}, {"target_area": True, "class_count": 4}),
        ({1: 5, 2: 6}, {"concrete": ConcreteConfig()}),
    ],
)
def test_the_last_convolution_before_the_upsampling_is_the_one_after_it(
    taps: dict[int, int], options: dict[str, Any]
) -> None:
    torch.manual_seed(1)
    masker = Masker(taps=taps, mask_size=(6, 6), **options).double()
    features = {layer: map_.double().requires_grad_() for layer, map_ in maps(taps).items()}
    conditions: dict[str, Tensor] = {}
    if "class_count" in options:
        conditions = {"target_area": torch.tensor([0.2, 0.7]).double(), "labels": torch.tensor([1, 3])}
    logits, plain = masker(features, **conditions), as_the_paper_says(masker, features, **conditions)
    torch.testing.assert_close(logits, plain, atol=1e-12, rtol=1e-12)
    wanted = [*features.values(), *masker.parameters()]
    for fast, slow in zip(
        torch.autograd.grad((logits**2).sum(), wanted, allow_unused=True),
        torch.autograd.grad((plain**2).sum(), wanted, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(fast, slow, atol=1e-10, rtol=1e-10)


def as_the_paper_says(masker: Masker, features: dict[int, Tensor], **conditions: Tensor) -> Tensor:
    """Up-sample every layer's maps, stack them, convolve the stack."""
    constants = masker._constants(features[masker.layers[0]], conditions.get("target_area"), conditions.get("labels"))
    stack = []
    for layer in masker.layers:
        part = features[layer]
        if constants is not None:
            part = torch.cat([part, constants.expand(-1, -1, *part.shape[2:])], dim=1)
        if layer not in masker.raw:
            part = getattr(masker, f"conv1x1_{layer}")(part)
        stack.append(nn.functional.interpolate(part, size=masker.mask_size, mode="bilinear", align_corners=False))
    last = next(module for module in masker.final.modules() if isinstance(module, nn.Conv2d))
    return last(torch.cat(stack, dim=1))
