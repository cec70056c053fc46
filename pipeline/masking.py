"""Masked-in and masked-out images (paper, section 1.1).

Shapes: images x (N, C, H, W), normalised; masks m (N, 1, H, W) or (N, 1, 1, 1)-broadcastable, in [0, 1], 1 = evidence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.fills import Fill
from pipeline.masker import Upsampling


def keep_only(
    x: Tensor, keep: Tensor, fill: Fill | Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The images with share ``keep`` of every pixel left and the rest replaced by ``fill``.

    ``fill``: None for zeros (the mean colour), the replacing images themselves, or a `Fill`.  What a fill computes
    carries no gradient; the product with ``keep`` does.
    """
    if fill is None:
        return x * keep
    if isinstance(fill, Tensor):
        return x * keep + fill.detach() * (1 - keep)
    return fill.apply(x, keep, generator)


def mask_in(
    x: Tensor, m: Tensor, fill: Fill | Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """x*m + fill*(1-m): what the mask shows."""
    return keep_only(x, m, fill, generator)


def mask_out(
    x: Tensor, m: Tensor, fill: Fill | Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """x*(1-m) + fill*m: what the mask hides."""
    return keep_only(x, 1 - m, fill, generator)


def upsample(mask: Tensor, size: tuple[int, int], mode: Upsampling = "nearest") -> Tensor:
    """Native masks (N, 1, h, w) -> (N, 1, *size).

    Nearest makes every value a block (published) and gives a pixel the cell that its centre lies in, also where the
    sizes do not divide; bilinear does not align corners.
    """
    if mode == "nearest":
        return F.interpolate(mask, size=size, mode="nearest-exact")
    return F.interpolate(mask, size=size, mode="bilinear", align_corners=False)
