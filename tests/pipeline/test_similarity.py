"""Similarity of masks: the ends of the scales."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.metrics.similarity import abs_spearman, similarities, spearman


def a_mask(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((48, 48))


def test_a_mask_is_like_itself() -> None:
    assert similarities(a_mask(), a_mask()) == pytest.approx(
        {"spearman": 1.0, "abs_spearman": 1.0, "hog_correl": 1.0, "ssim": 1.0}
    )


def test_the_inverted_mask_is_as_decided() -> None:
    assert spearman(a_mask(), 1 - a_mask()) == pytest.approx(-1.0)
    assert abs_spearman(a_mask(), 1 - a_mask()) == pytest.approx(1.0)


def test_rank_correlation_sees_order_only() -> None:
    assert spearman(a_mask(), a_mask() ** 3) == pytest.approx(1.0)


def test_unrelated_masks_are_not_alike() -> None:
    found = similarities(a_mask(0), a_mask(1))
    assert abs(found["spearman"]) < 0.1 and abs(found["abs_spearman"]) < 0.1
    assert found["hog_correl"] < 0.9 and found["ssim"] < 0.9


def test_a_constant_mask_has_no_correlation() -> None:
    assert np.isnan(spearman(a_mask(), np.ones((48, 48))))
