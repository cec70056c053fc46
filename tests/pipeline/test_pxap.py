"""PxAP against scikit-learn's definition by sorting, MaxBoxAcc by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.metrics.wsol import V1_IOUS, MaxBoxAcc, PixelPrecision, estimate_boxes


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean precision at the rank of each foreground pixel, ties together."""
    total = 0.0
    for level in np.unique(scores):
        above = scores >= level
        total += (scores[truth] == level).sum() * truth[above].sum() / above.sum()
    return total / truth.sum()


def test_pxap_is_average_precision_over_all_images() -> None:
    random = np.random.default_rng(0)
    scores = random.integers(0, 101, (3, 16, 16)) / 100
    truth = random.integers(0, 2, (3, 16, 16)).astype(np.uint8)
    truth[:, :3] = 255
    pixels = PixelPrecision(step=0.001)
    for score, mask in zip(scores, truth, strict=True):
        pixels.add(score, mask)
    counted = truth != 255
    assert pixels.value() == pytest.approx(average_precision(scores[counted], truth[counted] == 1))


def test_a_perfect_map_and_a_blind_one() -> None:
    truth = np.zeros((8, 8), dtype=np.uint8)
    truth[:4, :4] = 1
    for cells, expected in ((np.array([[1.0, 0.0], [0.0, 0.0]]), 1.0), (np.ones((2, 2)), 0.25)):
        pixels = PixelPrecision()
        pixels.add(cells, truth)
        assert pixels.value() == pytest.approx(expected)
    assert np.isnan(PixelPrecision().value())


def two_blobs() -> np.ndarray:
    scores = np.zeros((12, 12), dtype=np.float32)
    scores[0:4, 0:4] = 0.5
    scores[6:12, 6:12] = 1.0
    return scores


def test_boxes_of_all_components_or_the_largest() -> None:
    scores = two_blobs()
    several = estimate_boxes(scores, 0.2, size=24, multiple=True)
    assert sorted(several.tolist()) == [[0, 0, 8, 8], [12, 12, 24, 24]]
    assert estimate_boxes(scores, 0.2, size=24, multiple=False).tolist() == [[12, 12, 24, 24]]
    assert estimate_boxes(np.zeros((4, 4)), 0.0, size=24, multiple=True).shape == (0, 4)


def test_maxboxacc_takes_any_box_at_the_best_threshold() -> None:
    small, large = np.array([[0.0, 0.0, 8.0, 8.0]]), np.array([[12.0, 12.0, 24.0, 24.0]])
    several, single = MaxBoxAcc(size=24), MaxBoxAcc(size=24, ious=V1_IOUS, multiple=False)
    for boxes in (small, large):
        several.add(two_blobs(), boxes)
        single.add(two_blobs(), boxes)
    assert several.values().tolist() == [1.0, 1.0, 1.0]
    assert single.values().tolist() == [0.5]


def test_no_annotated_image_gives_no_figure() -> None:
    assert np.isnan(MaxBoxAcc(size=24).values()).all()
