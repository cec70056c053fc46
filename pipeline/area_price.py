"""The price of mask area, as a number or as a dual variable that holds the masks at a stated strength."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

RESCUE = 0.01
"""The price while masks are vanishing."""
SETTLING_AREA = 0.5
"""Mean mask while a classifier gets used to masked pictures."""
TOO_LARGE = 0.3
"""Misfit of masks that are about to become everything."""


@dataclass(frozen=True, kw_only=True)
class AreaPriceConfig:
    """How much a mask pays for its area."""

    rule: Literal["fixed", "entropy", "area"] = "entropy"
    """`fixed`: always `initial`.  `entropy`: the price rises while the masked-out pictures keep more than `target` of the
    uncertainty of a blank picture and the masked-in ones are recognised, and falls otherwise: masks become the smallest
    that still hide the evidence and still show enough of it.  With one side only, that side alone decides.
    `area`: the price rises while the mean mask is larger than `target`."""
    target: float = 0.8
    """What is held: a share of uncertainty, or a mean area; in (0, 1)."""
    sufficiency: float = 0.8
    """Rule `entropy`: share of the pictures recognised whole that must also be recognised masked-in."""
    largest_leak: float = 1.0
    """Rule `entropy`: the price rises only while at most this share of the pictures recognised whole is still recognised
    masked-out (pictures of the class that a blank one is taken for do not count: they are right by chance).  A classifier
    can be less sure of what is left than of a blank picture and yet name the right class."""
    initial: float = 2.0
    """The price at the start, in the units of the objective."""
    speed: float = 0.05
    """Relative change of the held price per step and unit of misfit."""
    response: float = 5.0
    """What is charged is the held price times exp(response x misfit of the step).  Masks follow a price by growing or
    shrinking, not by having a size, so a price that only adds misfits up would swing for ever (the proportional term of
    PID Lagrangian methods, Stooke et al. 2020)."""
    lowest: float = 2.0
    """The price does not fall below this, but as the next slots say; 2 is the published weight in units of log C (10 to 15
    over log 1000)."""
    highest: float = 30.0
    smallest_area: float = 0.04
    """Under this mean area the price is next to nothing, whatever the uncertainty says: such masks are on their way to
    nothing."""
    largest_area: float = 0.85
    """Rule `entropy`: above this mean area the price rises whatever the classifier says: a mask that is 1 everywhere has
    no gradient that could bring it back."""
    smallest_sufficiency: float = 0.4
    """While a smaller share than this of the pictures recognised whole is recognised masked-in, or a larger one than
    `largest_leak` masked-out, `lowest` gives way, by exp(response x what is missing): a weak classifier is unsure of whole
    pictures already, so that hiding gains little, and a fixed floor would only buy smaller and smaller masks."""
    settling: float = 0.2
    """Rule `entropy`, for a classifier that learns along from random weights: over this first share of the phase the price
    holds masks of half the picture instead.  Until such a classifier has seen masked pictures, what it says of them tells
    nothing of the masks."""

    def __post_init__(self) -> None:
        if self.rule not in ("fixed", "entropy", "area"):
            raise ValueError(f"area price rule {self.rule!r}: use fixed, entropy or area")
        if self.rule != "fixed" and not 0 < self.target < 1:
            raise ValueError(f"area price target {self.target} is not between 0 and 1")
        if not 0 < self.lowest <= self.initial <= self.highest and self.rule != "fixed":
            raise ValueError(f"area price {self.initial} is not between {self.lowest} and {self.highest}")
        if min(self.speed, self.response) < 0:
            raise ValueError(f"area price speed {self.speed}, response {self.response}: neither may be negative")
        if not 0 <= self.smallest_area < self.largest_area <= 1 or not 0 <= self.settling < 1:
            raise ValueError(
                f"area price between areas {self.smallest_area} and {self.largest_area}, settling over {self.settling}: "
                "give shares in [0, 1], the smaller area first"
            )


@dataclass(frozen=True)
class Price:
    """The state of the dual variable."""

    held: float
    """What the misfits of all steps have added up to."""
    charged: float
    """What area costs in the next step."""


def next_price(
    config: AreaPriceConfig,
    price: Price,
    *,
    entropy_share: float | None,
    leak: float | None,
    sufficiency: float | None,
    mean_area: float,
    settling: bool = False,
) -> Price:
    """The price after a step: proportional-integral ascent on its logarithm.

    ``entropy_share``: entropy of the masked-out pictures over that of a blank one, averaged over the pictures that
    the classifier gets right; ``leak``: share of these that it also gets right masked-out, and not by chance;
    ``sufficiency``: pictures recognised masked-in over those recognised whole; each none where the method has no such side.
    ``mean_area``: mean mask of the step, in [0, 1].
    ``settling``: whether the classifier has yet to see masked pictures (`AreaPriceConfig.settling`).
    """
    if config.rule == "fixed":
        return price
    if mean_area < config.smallest_area:
        falling = max(price.held * math.exp(-config.speed), config.lowest)
        return Price(min(price.held, falling), RESCUE)
    lowest, floor = config.lowest, config.lowest  # of the held price and of the charged one
    if config.rule == "area":
        misfit = mean_area - config.target
    elif settling:
        misfit, lowest, floor = mean_area - SETTLING_AREA, RESCUE, RESCUE
    else:
        misfits = [] if entropy_share is None else [entropy_share - config.target]
        misfits += [] if leak is None else [config.largest_leak - leak]
        misfits += [] if sufficiency is None else [sufficiency - config.sufficiency]
        misfit = min(misfits, default=0.0)
        missing = 0.0 if sufficiency is None else max(0.0, config.smallest_sufficiency - sufficiency)
        missing += 0.0 if leak is None else max(0.0, leak - config.largest_leak)
        floor *= math.exp(-config.response * missing)
        if mean_area > config.largest_area:
            misfit = max(misfit, TOO_LARGE)
    # Both shares are ratios, and boundless in a step in which hardly any picture is recognised whole.
    misfit = max(-1.0, min(1.0, misfit))
    held = min(max(price.held * math.exp(config.speed * misfit), lowest), config.highest)
    return Price(held, min(max(held * math.exp(config.response * misfit), floor), config.highest))
