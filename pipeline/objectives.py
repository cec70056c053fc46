"""The loss on one screen (paper, sections 1.2 and 1.3).

Shapes: B images, K classes; logits (B, K); labels (B,) int64; masks (B, 1, H, W) in [0, 1] at the size of the image.
Every loss is a sum over images divided by ``divisor``: the batch size, unless the caller names the size of a global
batch of which this is one part.  ``reduction="none"`` gives the (B,) summands, undivided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Reduction = Literal["mean", "none"]
FLIPPED_MARGIN = 1.0
"""Margin of the hinge where a masker was told a wrong class, in logits."""


def reduce(per_image: Tensor, reduction: Reduction = "mean", divisor: float | None = None) -> Tensor:
    """(B,) -> () sum / divisor, or as it is."""
    return per_image if reduction == "none" else per_image.sum() / (len(per_image) if divisor is None else divisor)


def classification_objective(
    logits: Tensor, labels: Tensor, *, reduction: Reduction = "mean", divisor: float | None = None
) -> Tensor:
    """O = -CE(z, y); all images count, right or wrong."""
    return reduce(-F.cross_entropy(logits, labels, reduction="none"), reduction, divisor)


def entropy_objective(
    logits: Tensor, clean_right: Tensor, *, reduction: Reduction = "mean", divisor: float | None = None
) -> Tensor:
    """O = okc * H(softmax z), in nats; images that the classifier gets wrong unmasked add 0 but stay in the divisor."""
    log_q = F.log_softmax(logits, dim=1)
    entropy = -(log_q.exp() * log_q).sum(dim=1)  # (B,)
    return reduce(clean_right.to(entropy) * entropy, reduction, divisor)


def hinge_objective(
    logits: Tensor,
    labels: Tensor,
    *,
    margin: float,
    trails: bool = False,
    reduction: Reduction = "mean",
    divisor: float | None = None,
) -> Tensor:
    """O = -relu(margin - d) of the label's lead d = z_y - max of the others; with ``trails`` +relu(margin + d).

    To maximise the one makes the label lead by the margin, to minimise the other makes it trail by as much (Dabkowski
    & Gal 2017, released code).
    """
    own = logits.gather(1, labels[:, None])[:, 0]  # (B,)
    lead = own - logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)  # (B,)
    return reduce(F.relu(margin + lead) if trails else -F.relu(margin - lead), reduction, divisor)


def power_area_term(
    mask: Tensor, *, power: float = 0.3, reduction: Reduction = "mean", divisor: float | None = None
) -> Tensor:
    """R = mean of (m + 5e-4)^power, paid for always (Dabkowski & Gal 2017, released code)."""
    return reduce((mask + 5e-4).pow(power).flatten(1).mean(dim=1), reduction, divisor)


def mask_area(mask: Tensor) -> Tensor:
    """a = mean of each mask, (B,)."""
    return mask.flatten(1).mean(dim=1)


def area_term(
    mask: Tensor,
    achieved: Tensor,
    *,
    target_area: Tensor | None = None,
    distance: Literal["l1", "l2"] = "l1",
    reduction: Reduction = "mean",
    divisor: float | None = None,
) -> Tensor:
    """R = -max(0, I - d): pays for a small area d = a only where the mask did its job (``achieved`` I, (B,) bool).

    With ``target_area`` p (B,): d = |a - p| (l1) or (a - p)^2 (l2).
    """
    d = mask_area(mask)  # (B,)
    if target_area is not None:
        d = d - target_area.to(d)
        d = d.abs() if distance == "l1" else d.square()
    return reduce(-F.relu(achieved.to(d) - d), reduction, divisor)  # relu: derivative 0 at the kink


def total_variation(
    mask: Tensor,
    *,
    power: int = 2,
    border: float = 0.3,
    reduction: Reduction = "mean",
    divisor: float | None = None,
) -> Tensor:
    """T = (sum of horizontal and vertical differences^p + border * sum over the four edges of m^p) / p.

    Sums over pixels, so its strength grows with resolution; corners lie on two edges; odd powers keep their sign.
    """
    across = (mask[..., :-1] - mask[..., 1:]).pow(power).flatten(1).sum(dim=1)  # (B,)
    down = (mask[..., :-1, :] - mask[..., 1:, :]).pow(power).flatten(1).sum(dim=1)
    edges = (mask[..., 0, :], mask[..., -1, :], mask[..., 0], mask[..., -1])  # one by one: H and W may differ
    frame = sum(edge.pow(power).flatten(1).sum(dim=1) for edge in edges)
    return reduce((across + down + border * frame) / power, reduction, divisor)


def _one_of(config: object, allowed: dict[str, tuple[str, ...]]) -> None:
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            raise ValueError(f"{name} {getattr(config, name)!r}: use {' or '.join(values)}")


@dataclass(frozen=True, kw_only=True)
class SideConfig:
    """What is asked of one kind of masked image."""

    side: Literal["in", "out"]
    """The masked-in image (what the mask shows) or the masked-out one (what it leaves)."""

    objective: Literal["classification", "entropy", "hinge"]
    """Of the classifier's answer: minus its cross-entropy with the label, its entropy, or how far the label leads."""

    direction: Literal["maximize", "minimize"] = "maximize"
    """Minimising classification is unbounded below; minimising entropy suits "in", maximising it "out"."""

    margin: float = 1.0
    """Of the hinge: by how much the label has to lead, or to trail when the hinge is minimised; in logits."""

    lambda_area: float = 10.0
    """Weight of the conditional area term."""

    lambda_tv: float = 0.0
    """Weight of total variation.  It is added per side, so two sides count it twice (as published)."""

    tv_power: int = 2
    """Power of total variation."""

    tv_border: float = 0.3
    """Weight of the frame inside total variation."""

    area_distance: Literal["l1", "l2"] = "l1"
    """Distance to the target area, where one is given."""

    area_rule: Literal["conditional", "power"] = "conditional"
    """Area paid for only where the mask did its job, or the mean of m^0.3 paid for always."""

    def __post_init__(self) -> None:
        _one_of(
            self,
            {
                "side": ("in", "out"),
                "objective": ("classification", "entropy", "hinge"),
                "direction": ("maximize", "minimize"),
                "area_distance": ("l1", "l2"),
                "area_rule": ("conditional", "power"),
            },
        )


class SideTerms(NamedTuple):
    """The parts of one side's loss; () each, or (B,) with ``reduction="none"``.  Indicators are (B,) bool."""

    total: Tensor
    """objective + area + tv: what is minimised."""
    objective: Tensor
    """The objective with its sign: -O to maximise, +O to minimise."""
    area: Tensor
    """The conditional area term with its weight, <= 0."""
    tv: Tensor
    """Total variation with its weight."""
    clean_right: Tensor
    """okc: right on the clean image."""
    masked_right: Tensor
    """okm: right on the masked image."""
    achieved: Tensor
    """The mask did its job: okm for "in", okc and not okm (non-trivially confused) for "out"."""


def side_loss(
    config: SideConfig,
    *,
    mask: Tensor,
    logits_masked: Tensor,
    logits_clean: Tensor,
    labels: Tensor,
    target_area: Tensor | None = None,
    lambda_area: float | Tensor | None = None,
    flipped: Tensor | None = None,
    reduction: Reduction = "mean",
    divisor: float | None = None,
) -> SideTerms:
    """L + R + T of one side; ``lambda_area`` (a number or 0-d tensor) takes the place of the configured weight.

    ``flipped``: (B,) bool, images whose mask is that of a class which they are not of: there the hinge has the other
    direction and the margin `FLIPPED_MARGIN`, so that an empty mask is best (Dabkowski & Gal 2017, released code).
    """
    clean_right = logits_clean.argmax(dim=1) == labels
    masked_right = logits_masked.argmax(dim=1) == labels
    achieved = masked_right if config.side == "in" else clean_right & ~masked_right

    per_image = _signed_objective(config, logits_masked, labels, clean_right)
    if flipped is not None:
        direction = "minimize" if config.direction == "maximize" else "maximize"
        other = replace(config, direction=direction, margin=FLIPPED_MARGIN)
        per_image = torch.where(flipped, _signed_objective(other, logits_masked, labels, clean_right), per_image)
    objective = reduce(per_image, reduction, divisor)

    weight = config.lambda_area if lambda_area is None else lambda_area
    if config.area_rule == "power":
        area = weight * power_area_term(mask, reduction=reduction, divisor=divisor)
    else:
        area = weight * area_term(
            mask, achieved, target_area=target_area, distance=config.area_distance, reduction=reduction, divisor=divisor
        )
    if config.lambda_tv:
        tv = config.lambda_tv * total_variation(
            mask, power=config.tv_power, border=config.tv_border, reduction=reduction, divisor=divisor
        )
    else:
        tv = torch.zeros_like(area)
    return SideTerms(objective + area + tv, objective, area, tv, clean_right, masked_right, achieved)


def _signed_objective(config: SideConfig, logits: Tensor, labels: Tensor, clean_right: Tensor) -> Tensor:
    """What is minimised for each image, (B,): -O to maximise, +O to minimise."""
    if config.objective == "classification":
        value = classification_objective(logits, labels, reduction="none")
    elif config.objective == "entropy":
        value = entropy_objective(logits, clean_right, reduction="none")
    else:
        trails = config.direction == "minimize"
        value = hinge_objective(logits, labels, margin=config.margin, trails=trails, reduction="none")
    return -value if config.direction == "maximize" else value


@dataclass(frozen=True, kw_only=True)
class KLPriorConfig:
    """The KL-to-prior criterion (paper, section 1.3): the masked-out answer should say no more than the class prior."""

    kl: Literal["forward", "backward"] = "forward"
    """forward: -sum p log q, cross-entropy to the prior; backward: sum q log(q/p)."""

    prior: Literal["subtract", "divide"] = "subtract"
    """An answer is right when arg max of q - p, or of q / p, is the label."""

    frequencies: Literal["uniform", "data"] = "uniform"
    """The prior: every class alike, or as often as the training pictures have it (`class_weights_of`)."""

    only_clean_right: bool = False
    """Count the divergence only where the clean image is right."""

    class_weight: bool = False
    """Multiply both terms by the weight of the label's class."""

    regularize_always: bool = False
    """Area term +lambda*a on every image, instead of the conditional one."""

    nothing_class: int | None = None
    """Images of this class have nothing to hide: their divergence is 0."""

    nothing_class_area_weight: float = 1.0
    """Factor of the area term on images of ``nothing_class``."""

    lambda_area: float = 10.0
    """Weight of the area term."""

    def __post_init__(self) -> None:
        known = {"kl": ("forward", "backward"), "prior": ("subtract", "divide"), "frequencies": ("uniform", "data")}
        _one_of(self, known)


class KLPriorTerms(NamedTuple):
    """() each, or (B,) with ``reduction="none"``."""

    total: Tensor
    objective: Tensor
    area: Tensor


def kl_prior_criterion(
    config: KLPriorConfig,
    *,
    mask: Tensor,
    logits_masked: Tensor,
    logits_clean: Tensor,
    labels: Tensor,
    class_weights: Tensor,
    reduction: Reduction = "mean",
    divisor: float | None = None,
) -> KLPriorTerms:
    """Divergence of the masked answer from the prior p_c = (1/w_c) / sum(1/w), plus area; weights w (K,) > 0."""
    p = (1 / class_weights) / (1 / class_weights).sum()  # (K,)
    clean_right = _beyond_prior(logits_clean, p, config.prior) == labels
    masked_right = _beyond_prior(logits_masked, p, config.prior) == labels
    log_q = F.log_softmax(logits_masked, dim=1)
    cells = -p * log_q if config.kl == "forward" else log_q.exp() * (log_q - p.log())  # (B, K)
    divergence = cells.sum(dim=1)
    if config.only_clean_right:
        divergence = divergence * clean_right

    a = mask_area(mask)
    area = config.lambda_area * (a if config.regularize_always else -F.relu((clean_right & ~masked_right).to(a) - a))
    if config.nothing_class is not None:
        nothing = labels == config.nothing_class
        divergence = divergence.masked_fill(nothing, 0.0)
        area = torch.where(nothing, config.nothing_class_area_weight * area, area)
    if config.class_weight:
        divergence, area = divergence * class_weights[labels], area * class_weights[labels]
    return KLPriorTerms(*(reduce(term, reduction, divisor) for term in (divergence + area, divergence, area)))


def class_weights_of(labels: Sequence[int], outputs: int) -> Tensor:
    """Weights (outputs,) of the classes, 1 on average: rare ones weigh more.

    Each class counts one picture more than it has, so that one without any has a weight, too.
    """
    counts = torch.bincount(torch.as_tensor(labels, dtype=torch.int64), minlength=outputs) + 1
    weights = 1 / counts.double()
    return (weights / weights.mean()).float()


def _beyond_prior(logits: Tensor, p: Tensor, how: Literal["subtract", "divide"]) -> Tensor:
    """The class whose probability stands out most from the prior, (B,)."""
    q = F.softmax(logits, dim=1)
    return (q - p if how == "subtract" else q / p).argmax(dim=1)
