"""The price of mask area, as a number or as a dual variable that holds the masks at a stated strength."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

RESCUE = 0.01
"""How far the price falls to bring masks back that are vanishing."""
LENIENCE = 0.2
"""Share of the floor to which the price falls while masks show too little.  No lower: masks follow the price some fifty
steps behind, and a price that has far to come back swings for ever between masks of a tenth and of the whole picture."""


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
    masked-out.  A classifier can be less sure of what is left than of a blank picture and yet name the right class."""
    initial: float = 2.0
    """The price at the start, in the units of the objective."""
    speed: float = 0.1
    """Relative change of the price per step and unit of misfit."""
    lowest: float = 2.0
    """The price never falls below this; 2 is the published weight in units of log C (10 to 15 over log 1000)."""
    highest: float = 30.0
    smallest_area: float = 0.04
    """Under this mean area the price falls whatever the uncertainty says, below `lowest` too: such masks are on their
    way to nothing."""
    smallest_sufficiency: float = 0.4
    """While a smaller share than this of the pictures recognised whole is recognised masked-in, the price falls below
    `lowest` too: a weak classifier is unsure of whole pictures already, so that hiding gains little, and a fixed floor
    would only buy smaller and smaller masks."""

    def __post_init__(self) -> None:
        if self.rule not in ("fixed", "entropy", "area"):
            raise ValueError(f"area price rule {self.rule!r}: use fixed, entropy or area")
        if self.rule != "fixed" and not 0 < self.target < 1:
            raise ValueError(f"area price target {self.target} is not between 0 and 1")
        if not 0 < self.lowest <= self.initial <= self.highest and self.rule != "fixed":
            raise ValueError(f"area price {self.initial} is not between {self.lowest} and {self.highest}")


def next_price(
    config: AreaPriceConfig,
    price: float,
    *,
    entropy_share: float | None,
    leak: float | None,
    sufficiency: float | None,
    mean_area: float,
) -> float:
    """The price after a step, by projected ascent on its logarithm.

    ``entropy_share``: entropy of the masked-out pictures over that of a blank one, averaged over the pictures that
    the classifier gets right; ``leak``: pictures recognised masked-out over those recognised whole; ``sufficiency``: the
    same of masked-in ones; each none where the method has no such side.  ``mean_area``: mean mask of the step, in [0, 1].
    """
    if config.rule == "fixed":
        return price
    if config.rule == "entropy":
        misfits = [] if entropy_share is None else [entropy_share - config.target]
        misfits += [] if leak is None else [config.largest_leak - leak]
        misfits += [] if sufficiency is None else [sufficiency - config.sufficiency]
        misfit = min(misfits, default=0.0)
    else:
        misfit = mean_area - config.target
    floor = config.lowest
    spare = 1.0  # how much more is shown than has to be
    if config.rule == "entropy" and sufficiency is not None:
        spare = sufficiency - config.smallest_sufficiency
    if mean_area < config.smallest_area:
        misfit, floor = -1.0, RESCUE
    elif spare < 0:
        misfit, floor = min(misfit, spare), min(price, LENIENCE * config.lowest)
    elif price < config.lowest:  # back to where it may be, as fast as the masks can afford
        misfit, floor = spare, price
    # Both shares are ratios, and boundless in a step in which hardly any picture is recognised whole.
    moved = math.log(price) + config.speed * max(-1.0, min(1.0, misfit))
    return min(max(math.exp(moved), floor), config.highest)
