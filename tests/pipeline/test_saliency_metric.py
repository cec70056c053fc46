"""Cut-outs and the two terms of the Saliency Metric."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.metrics.saliency_metric import AREA_FLOOR, cut_out, saliency_metric


def red_or_green(x: Tensor) -> Tensor:
    """Logits (N, 2): the means of the first two channels."""
    return 4 * x.mean((2, 3))[:, :2]


def half_red() -> Tensor:
    x = torch.zeros(3, 16, 16)
    x[0, :, :8] = 1
    x[1, :, 8:] = 1
    return x


def test_the_whole_box_is_the_image() -> None:
    x = torch.rand(3, 16, 16)
    torch.testing.assert_close(cut_out(x, (0, 0, 16, 16)), x)


@pytest.mark.parametrize("box", [None, (4, 4, 4, 9), (20, 2, 30, 8)])
def test_no_box_leaves_the_mean_colour(box: tuple[int, ...] | None) -> None:
    assert not cut_out(half_red(), box).any()


def test_the_box_decides() -> None:
    x = half_red().expand(4, -1, -1, -1)
    boxes = [(0, 0, 8, 16), (8, 0, 16, 16), (0, 0, 16, 16), None]
    found = saliency_metric(red_or_green, x, boxes, torch.zeros(4, dtype=torch.long))
    np.testing.assert_allclose(found.sm1, np.log([0.5, 0.5, 1.0, AREA_FLOOR]))
    sure, wrong, torn, blind = found.sm2
    assert sure > torn > wrong
    assert torn == pytest.approx(np.log(0.5)) == pytest.approx(blind)
    assert found.correct[0] and not found.correct[1]
