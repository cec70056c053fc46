"""Threshold-free localisation of the WSOL benchmark: PxAP and MaxBoxAcc (Choe et al. 2020; paper section 4).

Both are gathered image by image into fixed-size counts, so memory does not grow with the number of images.
Score maps are (h, w) float in [0, 1] and cover the (size, size) input.
"""

from __future__ import annotations

import cv2
import numpy as np

from pipeline.metrics.boxes import Compat
from pipeline.metrics.localisation import box_areas
from pipeline.metrics.masks import IGNORE, upsample_nearest

V1_IOUS = (0.5,)
V2_IOUS = (0.3, 0.5, 0.7)


class PixelPrecision:
    """PxAP: average precision of the pixels of all images pooled, over thresholds 0, step, 2 step, ... < 1."""

    def __init__(self, *, step: float = 0.001) -> None:
        self.step = step
        self._edges = np.arange(0, 1, step)
        # One bin a threshold, one for scores of 1 and more, and an empty one above, as the benchmark has it.
        self.foreground = np.zeros(len(self._edges) + 2, dtype=np.int64)
        self.background = np.zeros_like(self.foreground)

    def add(self, scores: np.ndarray, truth: np.ndarray) -> None:
        """``scores`` (h, w) in [0, 1]; ``truth`` (S, S) of 1 foreground, 0 background, 255 ignored."""
        bins = np.searchsorted(self._edges, scores, side="right") - 1
        bins[scores >= 1] = len(self._edges)
        stretched = upsample_nearest(bins, truth.shape[0])
        self.foreground += np.bincount(stretched[truth == 1], minlength=len(self.foreground))
        self.background += np.bincount(stretched[(truth != 1) & (truth != IGNORE)], minlength=len(self.background))

    def value(self) -> float:
        """PxAP in 0..1; nan when no foreground was added."""
        true, false = (counts[::-1].cumsum() for counts in (self.foreground, self.background))
        if not true[-1]:
            return float("nan")
        recall = true / true[-1]
        predicted = true + false
        precision = np.divide(true, predicted, out=np.zeros(len(true)), where=predicted > 0)
        return float((precision[1:] * np.diff(recall)).sum())


class MaxBoxAcc:
    """MaxBoxAcc: share of images with a box of enough IoU, at the best threshold of the score map.

    Version 2 takes any connected component (``multiple``) and the mean over three IoUs; version 1 the largest one and
    IoU 0.5.
    """

    def __init__(
        self,
        *,
        size: int,
        ious: tuple[float, ...] = V2_IOUS,
        multiple: bool = True,
        thresholds: int = 100,
        compat: Compat = None,
    ) -> None:
        self.size = size
        self.ious = ious
        self.multiple = multiple
        self.thresholds = np.arange(0, 1, 1 / thresholds)
        self.compat: Compat = compat
        self.right = np.zeros((len(ious), thresholds), dtype=np.int64)
        """Images found so far, per IoU and threshold."""
        self.images = 0

    def add(self, scores: np.ndarray, boxes: np.ndarray) -> None:
        """``scores`` (h, w) in [0, 1]; ``boxes`` (k, 4) true boxes in input pixels, inside the input."""
        self.images += 1
        # Thresholds between two neighbouring scores cut out the same region: a nearly binary map has few regions to look at.
        ordered = np.sort(scores, axis=None)
        kept, right = -1, [False] * len(self.ious)
        for column, threshold in enumerate(self.thresholds):
            count = scores.size - int(np.searchsorted(ordered, float(threshold) * scores.max(), side="right"))
            if count != kept or self.compat == "published":  # the published rule rounds the scores first
                estimates = estimate_boxes(
                    scores, float(threshold), size=self.size, multiple=self.multiple, compat=self.compat
                )
                best = _pairwise_iou(estimates, boxes, inclusive=self.compat == "published").max(initial=0.0)
                kept, right = count, [best >= iou for iou in self.ious]
            self.right[:, column] += right

    def values(self) -> np.ndarray:
        """The best share (0..1) over the thresholds, per IoU; nan when no image was added."""
        return self.right.max(axis=1) / self.images if self.images else np.full(len(self.ious), np.nan)


def estimate_boxes(
    scores: np.ndarray, threshold: float, *, size: int, multiple: bool, compat: Compat = None
) -> np.ndarray:
    """Boxes (e, 4) in input pixels of the regions where ``scores`` (h, w) exceed ``threshold`` times their maximum.

    Regions are 8-connected; not ``multiple``: only the largest.  ``published``: regions of the map rounded down to
    8 bits are found by their contours, those of holes too, ends are half-open but stop one pixel before the border and
    are then taken as inclusive, and nothing found gives one box (0, 0, 0, 0).
    """
    if compat == "published":
        return _contour_boxes(scores, threshold, multiple=multiple)
    above = (scores > threshold * scores.max()).astype(np.uint8)
    stats = cv2.connectedComponentsWithStats(above, connectivity=8)[2][1:]
    if not multiple and len(stats):
        stats = stats[[stats[:, cv2.CC_STAT_AREA].argmax()]]
    starts, extents = stats[:, :2], stats[:, 2:4]
    cell = np.array([size / scores.shape[1], size / scores.shape[0]] * 2)
    return np.concatenate([starts, starts + extents], axis=1) * cell


def _contour_boxes(scores: np.ndarray, threshold: float, *, multiple: bool) -> np.ndarray:
    levels = (255 * scores).astype(np.uint8)
    above = np.where(levels > int(threshold * int(levels.max())), np.uint8(255), np.uint8(0))
    contours = cv2.findContours(above, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    if not contours:
        return np.zeros((1, 4), dtype=np.int64)
    if not multiple:
        contours = [max(contours, key=cv2.contourArea)]
    height, width = scores.shape
    rectangles = [cv2.boundingRect(contour) for contour in contours]
    return np.array([[x, y, min(x + w, width - 1), min(y + h, height - 1)] for x, y, w, h in rectangles])


def _pairwise_iou(first: np.ndarray, second: np.ndarray, *, inclusive: bool) -> np.ndarray:
    """IoU (e, k) of boxes (e, 4) and (k, 4); ``inclusive`` ends belong to the box."""
    one = 1 if inclusive else 0
    low, high = np.maximum(first[:, None, :2], second[:, :2]), np.minimum(first[:, None, 2:], second[:, 2:])
    overlap = np.prod(np.maximum(high - low + one, 0), axis=2, dtype=np.float64)
    grown = np.array([0, 0, one, one])
    union = box_areas(first + grown)[:, None] + box_areas(second + grown) - overlap
    return overlap / np.maximum(union, 1e-9)
