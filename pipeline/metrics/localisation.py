"""How well one predicted box and one soft mask fit the true boxes of an image (section 4 of the paper).

Boxes are ``(x0, y0, x1, y1)``, half-open, in pixels of the square network input of side ``size``.  True boxes of a
cropped picture may leave the input: by default only their visible part counts.  ``compat="published"`` keeps their
whole area in the denominator, so that an object cut by the crop can never be found fully.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.metrics.boxes import Compat

HIT_IOU = 0.5
"""A predicted box hits a true one when their IoU is strictly above this."""
_EPSILON = 1e-6


def clip_boxes(boxes: np.ndarray, size: int) -> np.ndarray:
    """Boxes (k, 4) cut to the input; one that lies outside becomes empty (area 0)."""
    clipped = np.clip(boxes, 0, size)
    clipped[:, 2:] = np.maximum(clipped[:, 2:], clipped[:, :2])
    return clipped


def box_areas(boxes: np.ndarray) -> np.ndarray:
    """Areas (k,) of boxes (k, 4) in square pixels; 0 where an end comes before its start."""
    return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1, dtype=np.float64)


def box_ious(box: Sequence[float] | None, boxes: np.ndarray, size: int, *, compat: Compat = None) -> np.ndarray:
    """IoU (k,) of one predicted box with true boxes (k, 4); all 0 for no box, 0 for an empty true box."""
    if box is None:
        return np.zeros(len(boxes))
    predicted = np.asarray(box, dtype=np.float64)
    visible = clip_boxes(boxes, size)
    overlap = np.minimum(visible[:, 2:], predicted[2:]) - np.maximum(visible[:, :2], predicted[:2])
    intersection = np.prod(np.maximum(overlap, 0), axis=1, dtype=np.float64)
    areas = box_areas(boxes if compat == "published" else visible)
    union = box_areas(predicted[None])[0] + areas - intersection
    return np.where(areas > 0, intersection / np.maximum(union, _EPSILON), 0.0)


def soft_f1(mask: np.ndarray, boxes: np.ndarray, size: int, *, compat: Compat = None) -> np.ndarray:
    """F1 (k,) of a soft mask (h, w) in [0, 1], stretched over the input by nearest, with each of the boxes (k, 4).

    precision = mass inside / mass, recall = mass inside / area of the box; 0 for an empty box.
    """
    visible = clip_boxes(boxes, size)
    columns, rows = _overlap(visible[:, [0, 2]], mask.shape[1], size), _overlap(visible[:, [1, 3]], mask.shape[0], size)
    values = mask.astype(np.float64)
    inside = np.einsum("kh,hw,kw->k", rows, values, columns)  # in square pixels of the input, cells cut exactly
    mass = values.mean() * size * size
    areas = box_areas(boxes if compat == "published" else visible)
    precision = inside / (mass + _EPSILON)
    recall = np.divide(inside, areas, out=np.zeros(len(boxes)), where=areas > 0)
    return 2 * precision * recall / (precision + recall + _EPSILON)


def published_input_boxes(boxes: np.ndarray, width: int, height: int, size: int, *, squash: bool = False) -> np.ndarray:
    """Boxes (k, 4) of a width x height picture in the input as the published code maps them: whole pixels, not clipped.

    The short side becomes ``size`` and half the surplus of the longer one is cut off (``squash``: each side becomes
    ``size``); coordinates are truncated toward zero.
    """
    if squash:
        scaled = boxes * np.array([size / width, size / height] * 2)
        return np.trunc(scaled).astype(np.int64)
    scale = size / min(width, height)
    surplus_x, surplus_y = (max(side * scale - size, 0.0) / 2 for side in (width, height))
    return np.trunc(boxes * scale - np.array([surplus_x, surplus_y] * 2)).astype(np.int64)


def _overlap(spans: np.ndarray, cells: int, size: int) -> np.ndarray:
    """Length (k, cells), in input pixels, of what each span (k, 2) of the input shares with each mask cell."""
    edges = np.arange(cells + 1) * (size / cells)
    shared = np.minimum(spans[:, 1:], edges[1:]) - np.maximum(spans[:, :1], edges[:-1])
    return np.maximum(shared, 0)
