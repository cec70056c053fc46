"""What masks look like, without any truth: area, spread, how binary and how ragged they are (section 4 of the paper).

Masks are (N, h, w) float arrays in [0, 1].
"""

from __future__ import annotations

import numpy as np

from pipeline.metrics.boxes import Compat

IGNORE = 255
"""Value of a pixel of a true mask that counts neither as foreground nor as background."""


def upsample_nearest(masks: np.ndarray, size: int) -> np.ndarray:
    """Masks (..., h, w) stretched over the (size, size) input: pixel i shows the cell that its centre lies in."""
    rows, columns = (((2 * np.arange(size) + 1) * cells) // (2 * size) for cells in masks.shape[-2:])
    return masks[..., rows[:, None], columns]


def entropy(masks: np.ndarray, *, compat: Compat = None) -> np.ndarray:
    """Mean binary entropy (N,) of the cells in bits: 0 for black and white, 1 for grey.

    ``published`` leaves out the half of it that belongs to 1 - m.
    """
    values = masks.astype(np.float64)
    bits = _plogp(values)
    if compat is None:
        bits = bits + _plogp(1 - values)
    return np.asarray(bits.mean(axis=(1, 2)))


def total_variation(masks: np.ndarray, size: int) -> np.ndarray:
    """Mean squared difference (N,) of neighbours, across plus down, of the masks stretched over the whole input."""
    stretched = upsample_nearest(masks, size)
    across, down = np.diff(stretched, axis=2), np.diff(stretched, axis=1)
    return np.asarray((across**2).mean((1, 2), dtype=np.float64) + (down**2).mean((1, 2), dtype=np.float64))


def spread(means: np.ndarray, *, batch_size: int, compat: Compat = None) -> float:
    """Unbiased standard deviation across images of the per-image mask means (n,); nan for a single image.

    ``published`` takes it in each batch of ``batch_size`` and averages, weighted by the size of the batch.
    """
    if compat is None:
        return float(means.std(ddof=1)) if len(means) > 1 else float("nan")
    batches = [means[start : start + batch_size] for start in range(0, len(means), batch_size)]
    return float(sum(batch.std(ddof=1) * len(batch) for batch in batches if len(batch) > 1) / len(means))


def mask_iou(binary: np.ndarray, truth: np.ndarray) -> float:
    """IoU of a binary mask (h, w), stretched by nearest, with a true mask (S, S) of 0, 1 and 255 (ignored).

    nan when the truth holds no foreground.
    """
    predicted = upsample_nearest(binary, truth.shape[0]) & (truth != IGNORE)
    foreground = truth == 1
    if not foreground.any():
        return float("nan")
    return float((predicted & foreground).sum() / (predicted | foreground).sum())


def _plogp(values: np.ndarray) -> np.ndarray:
    """-p log2 p, 0 at p = 0."""
    return -values * np.log2(np.where(values > 0, values, 1.0))
