"""From a saliency mask to one box: binarise, keep the largest connected component, take its tight box.

A mask is one (h, w) array, float in [0, 1] or uint8 in 0..255 (only comparisons with the mask's own mean matter, so the
scale does not).  A box is ``(x0, y0, x1, y1)`` in mask cells, x = column, y = row, half-open: it covers the cells
``mask[y0:y1, x0:x1]``.  Source: section 4 of the paper.

``compat="published"`` repeats what the published evaluation did although it is doubtful, so that its numbers can be
compared: the mean in float32, the last row and column of a box lost, and (0, 0, 0, 0) for a mask without a box.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np

Box = tuple[int, int, int, int]
Compat = Literal["published"] | None


def mean_threshold(mask: np.ndarray, *, compat: Compat = None) -> float:
    """Mean of a mask (h, w), summed in float64; ``published`` takes PyTorch's float32 mean."""
    if compat == "published":
        import torch  # only here: its rounding decides what the published rule gives for a constant mask

        return float(torch.from_numpy(np.ascontiguousarray(mask, dtype=np.float32)).mean())
    return float(mask.mean(dtype=np.float64))


def binarize(mask: np.ndarray, *, compat: Compat = None) -> np.ndarray:
    """Cells (h, w) bool strictly above the mean of the mask.

    A constant mask has none: the rounding of its mean must not decide (which it does in ``published``).
    """
    if compat is None and mask.min() == mask.max():
        return np.zeros(mask.shape, dtype=bool)
    return mask > mean_threshold(mask, compat=compat)


def binarize_quantile(mask: np.ndarray) -> np.ndarray:
    """Cells (h, w) bool above the quantile that leaves the mask's mean as the share of ones (Zolna et al., CASM).

    The mask is float in [0, 1].  The threshold is the order statistic number ``1 + int((n - 1)(1 - mean) + 0.5)`` of
    the n cells, kept within [1e-6, 1 - 1e-6].
    """
    ordered = np.sort(mask, axis=None)
    rank = int((mask.size - 1) * (1.0 - float(mask.mean(dtype=np.float64))) + 0.5)
    return mask > np.clip(ordered[rank], 1e-6, 1 - 1e-6)


def largest_component(binary: np.ndarray) -> np.ndarray:
    """The largest 4-connected component of a binary mask (h, w) as (h, w) bool; all False when nothing is set.

    Of equally large ones it is the first in raster order.
    """
    labels, best = _components(binary)[:2]
    return labels == best if best else np.zeros(binary.shape, dtype=bool)


def mask_box(mask: np.ndarray, *, compat: Compat = None) -> Box | None:
    """Tight box in mask cells of the largest component above the mean of ``mask`` (h, w); None when nothing is above.

    ``published`` gives the index of the last column and row where the end of a half-open box belongs, so one row and
    one column are lost and a component one cell wide gets an empty box, and (0, 0, 0, 0) when there is none.
    """
    return component_box(binarize(mask, compat=compat), compat=compat)


def component_box(binary: np.ndarray, *, compat: Compat = None) -> Box | None:
    """`mask_box` of a mask that is already binary (h, w)."""
    _, best, stats = _components(binary)
    if not best:
        return (0, 0, 0, 0) if compat == "published" else None
    x, y, width, height = (int(value) for value in stats[best, :4])
    lost = 1 if compat == "published" else 0
    return x, y, x + width - lost, y + height - lost


def scale_box(box: Box, shape: tuple[int, int], size: int) -> tuple[float, float, float, float]:
    """A box in cells of a mask of ``shape`` (h, w) as a box in pixels of the (size, size) input under it."""
    scale_x, scale_y = size / shape[1], size / shape[0]
    return box[0] * scale_x, box[1] * scale_y, box[2] * scale_x, box[3] * scale_y


def _components(binary: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
    """Label image, label of the largest component (0: none), and OpenCV's statistics (x, y, width, height, area)."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(binary.astype(np.uint8), connectivity=4)
    if count < 2:
        return labels, 0, stats
    areas = stats[1:, cv2.CC_STAT_AREA]
    largest = 1 + np.flatnonzero(areas == areas.max())
    # OpenCV does not promise the order of its labels, so a tie is settled by the first cell that any of them holds.
    best = largest[0] if len(largest) == 1 else labels.flat[np.flatnonzero(np.isin(labels, largest))[0]]
    return labels, int(best), stats
