"""The loss beyond its recorded values: shares of a batch add up, gradients are right, wrong settings are refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.objectives import (
    KLPriorConfig,
    SideConfig,
    area_term,
    entropy_objective,
    hinge_objective,
    kl_prior_criterion,
    side_loss,
    total_variation,
)

OUT = SideConfig(side="out", objective="entropy", lambda_area=10.0, lambda_tv=0.01)
SIDES = [
    replace(OUT, side=side, objective=objective, direction=direction)
    for side, objective, direction in itertools.product(
        ("in", "out"), ("classification", "entropy"), ("maximize", "minimize")
    )
]


@pytest.fixture
def batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 5, (6,), generator=g)
    clean = torch.randn(6, 5, generator=g, dtype=torch.float64)
    clean[torch.arange(4), labels[:4]] += 5  # the first four are right
    return {
        "mask": torch.rand(6, 1, 7, 9, generator=g, dtype=torch.float64),
        "logits_masked": torch.randn(6, 5, generator=g, dtype=torch.float64),
        "logits_clean": clean,
        "labels": labels,
    }


def part(batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in batch.items()}


@pytest.mark.parametrize("config", SIDES, ids=lambda c: f"{c.side}-{c.objective}-{c.direction}")
def test_unequal_shares_of_a_batch_add_up_to_the_whole(batch, config: SideConfig) -> None:
    whole = side_loss(config, **batch)
    shares = [side_loss(config, **part(batch, rows), divisor=6) for rows in (slice(0, 1), slice(1, 6))]
    each = side_loss(config, **batch, reduction="none")
    for name in ("total", "objective", "area", "tv"):
        torch.testing.assert_close(sum(getattr(share, name) for share in shares), getattr(whole, name))
        assert getattr(each, name).shape == (6,)
        torch.testing.assert_close(getattr(each, name).mean(), getattr(whole, name))


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("config", SIDES, ids=lambda c: f"{c.side}-{c.objective}-{c.direction}")
def test_gradients_agree_with_finite_differences(batch, config: SideConfig, target: bool) -> None:
    p = torch.linspace(0.2, 0.4, 6, dtype=torch.float64) if target else None

    def total(mask: Tensor, logits: Tensor) -> Tensor:
        return side_loss(config, **{**batch, "mask": mask, "logits_masked": logits}, target_area=p).total

    inputs = (batch["mask"].requires_grad_(), batch["logits_masked"].requires_grad_())
    assert torch.autograd.gradcheck(total, inputs)


def test_the_area_weight_may_be_a_tensor_and_overrides_the_configured_one(batch) -> None:
    by_number = side_loss(replace(OUT, lambda_area=2.5), **batch)
    by_tensor = side_loss(OUT, **batch, lambda_area=torch.tensor(2.5, dtype=torch.float64))
    assert by_number.area != 0
    torch.testing.assert_close(by_tensor.total, by_number.total)


def test_area_is_paid_for_only_after_success(batch) -> None:
    mask = batch["mask"].requires_grad_()
    achieved = torch.tensor([True, False, True, False, False, True])
    area_term(mask, achieved).backward()
    assert mask.grad is not None
    per_pixel = 1 / (6 * 7 * 9)
    expected = achieved.double()[:, None, None, None].expand_as(mask) * per_pixel
    torch.testing.assert_close(mask.grad, expected)


def test_area_has_no_gradient_at_its_kink() -> None:
    mask = torch.ones(1, 1, 4, 4, requires_grad=True)  # I - a = 0
    area_term(mask, torch.tensor([True])).backward()
    assert mask.grad is not None and not mask.grad.any()


def test_a_mask_of_the_wanted_area_pays_nothing_and_others_pay() -> None:
    mask = torch.full((2, 1, 4, 4), 0.25)
    achieved = torch.tensor([True, True])
    each = area_term(mask, achieved, target_area=torch.tensor([0.25, 0.75]), reduction="none")
    torch.testing.assert_close(each, torch.tensor([-1.0, -0.5]))
    each = area_term(mask, achieved, target_area=torch.tensor([0.25, 0.75]), distance="l2", reduction="none")
    torch.testing.assert_close(each, torch.tensor([-1.0, -0.75]))


def test_entropy_of_even_odds_and_of_certainty_in_nats() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1000.0, 0.0, 0.0, 0.0]])
    each = entropy_objective(logits, torch.tensor([True, True]), reduction="none")
    torch.testing.assert_close(each, torch.tensor([math.log(4), 0.0]))


@pytest.mark.parametrize("shape", [(2, 1, 5, 8), (1, 1, 8, 5), (1, 1, 2, 2), (1, 1, 1, 4)])
@pytest.mark.parametrize("power", [1, 2, 3])
def test_total_variation_of_masks_that_are_not_square(shape: tuple[int, ...], power: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images, _, rows, columns = shape
    total = 0.0
    for n in range(images):
        m = mask[n, 0].tolist()
        for r, c in itertools.product(range(rows), range(columns)):
            total += (m[r][c] - m[r][c + 1]) ** power if c + 1 < columns else 0
            total += (m[r][c] - m[r + 1][c]) ** power if r + 1 < rows else 0
            total += 0.3 * m[r][c] ** power * ((r == 0) + (r == rows - 1) + (c == 0) + (c == columns - 1))
    assert float(total_variation(mask, power=power)) == pytest.approx(total / (power * images))


def test_kl_prior_shares_add_up(batch) -> None:
    weights = torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0], dtype=torch.float64)
    config = KLPriorConfig(class_weight=True, only_clean_right=True)
    whole = kl_prior_criterion(config, **batch, class_weights=weights)
    shares = [
        kl_prior_criterion(config, **part(batch, rows), class_weights=weights, divisor=6)
        for rows in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(shares[0].total + shares[1].total, whole.total)


def test_kl_prior_judges_by_difference_or_by_ratio() -> None:
    """Prior (1/6, 1/3, 1/2), answer (.3, .5, .2): class 1 exceeds its prior by most, class 0 by the largest factor."""
    weights = torch.tensor([6.0, 3.0, 2.0], dtype=torch.float64)
    clean = torch.tensor([[0.3, 0.5, 0.2]], dtype=torch.float64).log()
    masked = torch.tensor([[0.1, 0.1, 0.8]], dtype=torch.float64).log()
    batch = {"mask": torch.full((1, 1, 2, 2), 0.25), "logits_masked": masked, "logits_clean": clean}
    for label, prior in ((1, "subtract"), (0, "divide")):
        config = KLPriorConfig(prior=prior, only_clean_right=True, lambda_area=1.0)
        right = kl_prior_criterion(config, **batch, labels=torch.tensor([label]), class_weights=weights)
        wrong = kl_prior_criterion(config, **batch, labels=torch.tensor([1 - label]), class_weights=weights)
        assert right.objective > 0 and right.area.item() == pytest.approx(-0.75)
        assert wrong.objective == 0 and wrong.area == 0


@pytest.mark.parametrize(
    ("field", "value"), [("side", "both"), ("objective", "margin"), ("direction", "max"), ("area_distance", "l3")]
)
def test_unknown_settings_are_quoted(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{field} '{value}': use "):
        replace(OUT, **{field: value})
    with pytest.raises(ValueError, match="prior 'add': use subtract or divide"):
        KLPriorConfig(prior="add")  # pyright: ignore[reportArgumentType]


def test_the_hinge_is_how_far_the_label_leads_or_trails() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1])  # leads by 2, trails by 2
    leads = hinge_objective(logits, labels, margin=3.0, reduction="none")
    assert torch.equal(leads, torch.tensor([-1.0, -5.0], dtype=torch.float64))
    trails = hinge_objective(logits, labels, margin=3.0, trails=True, reduction="none")
    assert torch.equal(trails, torch.tensor([5.0, 1.0], dtype=torch.float64))
    config = SideConfig(
        side="out", objective="hinge", direction="minimize", margin=3.0, lambda_area=8.0, area_rule="power"
    )
    mask = torch.full((2, 1, 4, 4), 0.25, dtype=torch.float64)
    terms = side_loss(config, mask=mask, logits_masked=logits, logits_clean=logits, labels=labels, reduction="none")
    assert torch.allclose(terms.objective, trails)
    assert torch.allclose(terms.area, torch.full((2,), 8 * 0.2505**0.3, dtype=torch.float64))


def test_a_wrong_class_turns_the_hinge_round() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, generator=random, dtype=torch.float64)
    labels, flipped = torch.tensor([0, 1, 2, 3]), torch.tensor([True, False, True, False])
    mask = torch.full((4, 1, 4, 4), 0.25, dtype=torch.float64)

    def objective(direction: str, margin: float, **more: object) -> torch.Tensor:
        config = SideConfig(side="out", objective="hinge", direction=direction, margin=margin)  # pyright: ignore[reportArgumentType]
        return side_loss(
            config, mask=mask, logits_masked=logits, logits_clean=logits, labels=labels, reduction="none", **more
        ).objective

    turned = objective("minimize", 5.0, flipped=flipped)
    assert torch.equal(turned[~flipped], objective("minimize", 5.0)[~flipped])
    assert torch.equal(turned[flipped], objective("maximize", 1.0)[flipped]), "and with a margin of 1"
