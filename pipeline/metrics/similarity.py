"""How alike two masks are: the measures of the sanity checks of Adebayo et al. (paper section 4).

Masks are (h, w) float arrays of the same shape.  A constant mask has no correlation with anything: nan.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata
from skimage.feature import hog
from skimage.metrics import structural_similarity

HOG_CELL = 16
SSIM_WINDOW = 5
SSIM_RANGE = 2.0
"""Data range of the published figures: scikit-image's old default for floats, which may be in [-1, 1]."""


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation of all pixels."""
    return _pearson(rankdata(first), rankdata(second))


def abs_spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation of |0.5 - m|: how decided the masks are, whichever way."""
    return spearman(np.abs(0.5 - first), np.abs(0.5 - second))


def hog_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson correlation of the HOG descriptors with cells of 16 x 16 pixels; masks of at least 48 x 48 pixels."""
    cells = (HOG_CELL, HOG_CELL)
    return _pearson(*(np.asarray(hog(mask, pixels_per_cell=cells)) for mask in (first, second)))


def ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Structural similarity with a uniform window of 5 pixels and the sample covariance."""
    return float(np.asarray(structural_similarity(first, second, win_size=SSIM_WINDOW, data_range=SSIM_RANGE)))


def similarities(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """All four by name."""
    return {
        "spearman": spearman(first, second),
        "abs_spearman": abs_spearman(first, second),
        "hog_correl": hog_correlation(first, second),
        "ssim": ssim(first, second),
    }


def _pearson(first: np.ndarray, second: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):  # nothing varies: nan
        return float(np.corrcoef(first, second)[0, 1])
