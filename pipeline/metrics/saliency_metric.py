"""The Saliency Metric of Dabkowski and Gal (paper section 4): can the classifier still tell from the box alone?

SM = SM1 - SM2, lower is better.  SM1 = log(max(area of the box / area of the input, 0.05)); SM2 = log of the
probability that the classifier gives to the true class on the box, cut out and stretched over the whole input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

AREA_FLOOR = 0.05


class SaliencyMetric(NamedTuple):
    """Per image: ``sm1``, ``sm2`` (N,) float64 and ``correct`` (N,) bool, top-1 on the cut-out."""

    sm1: np.ndarray
    sm2: np.ndarray
    correct: np.ndarray


def cut_out(x: Tensor, box: Sequence[float] | None) -> Tensor:
    """The part ``box`` of an image (3, S, S), stretched by bicubic interpolation to (3, S, S).

    ``box`` is (x0, y0, x1, y1) in input pixels; a fraction is rounded to the nearest pixel.  No or an empty box: zeros.
    """
    if box is None:
        return torch.zeros_like(x)
    x0, y0, x1, y1 = (round(value) for value in box)
    part = x[:, max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
    if part.numel() == 0:
        return torch.zeros_like(x)
    return F.interpolate(part[None], size=x.shape[1:], mode="bicubic", align_corners=False)[0]


@torch.no_grad()
def saliency_metric(
    classify: Callable[[Tensor], Tensor], x: Tensor, boxes: Sequence[Sequence[float] | None], targets: Tensor
) -> SaliencyMetric:
    """Both terms for one box an image.

    ``classify``: normalised images (N, 3, S, S) -> logits (N, C); ``x``: (N, 3, S, S) normalised; ``targets``: (N,)
    index of the logit of the true class.  An image without a box is judged on a blank (mean colour) input at the floor.
    """
    size = x.shape[-1]
    logits = classify(torch.stack([cut_out(image, box) for image, box in zip(x, boxes, strict=True)]))
    sm2 = logits.float().log_softmax(1).gather(1, targets[:, None])[:, 0]
    areas = np.array([0.0 if box is None else max(box[2] - box[0], 0) * max(box[3] - box[1], 0) for box in boxes])
    sm1 = np.log(np.clip(areas / (size * size), AREA_FLOOR, 1.0))
    correct = logits.argmax(1) == targets
    return SaliencyMetric(sm1, sm2.cpu().numpy().astype(np.float64), correct.cpu().numpy())
