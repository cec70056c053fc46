"""The localisation protocol of the paper (section 4), gathered image by image for one method of making maps.

A method gives `Maps` for a batch; a `Tally` compares them with the truth and keeps a few numbers an image, and
fixed-size counts for PxAP and MaxBoxAcc, so that no map outlives its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipeline.metrics import masks as mask_statistics
from pipeline.metrics.boxes import Compat, binarize, component_box, scale_box
from pipeline.metrics.localisation import HIT_IOU, box_areas, box_ious, clip_boxes, soft_f1
from pipeline.metrics.saliency_metric import SaliencyMetric
from pipeline.metrics.wsol import MaxBoxAcc, PixelPrecision

PixelBox = tuple[float, float, float, float]

PER_IMAGE = (
    "OM", "LE", "F1", "F1a", "SM", "SM1", "SM2", "sm_acc", "top1", "top5",
    "mask_mean", "binarized", "entropy", "tv", "mask_iou",
)  # fmt: skip
"""Metrics that are means over images of a number per image."""
PUBLISHED_STEP = 0.01
"""Distance of PxAP's thresholds in the published figures; the benchmark's own is a tenth of it."""
BOX_IOU = "box_iou"
"""Column, beside those, of the best IoU of the predicted box with a true one: for choosing images, not a metric."""
METRICS = (
    "OM", "LE", "F1", "F1a", "SM", "SM1", "SM2", "sm_acc", "top1", "top5", "PxAP", "MaxBoxAccV2",
    "mask_mean", "mask_std", "binarized", "entropy", "tv", "mask_iou", "n_images",
)  # fmt: skip
"""The keys of `metrics.json`, in order."""


@dataclass(frozen=True, kw_only=True)
class Maps:
    """What one method says about the N images of a batch."""

    masks: np.ndarray
    """(N, h, w) float32 in [0, 1]; each covers its whole input."""
    binary: np.ndarray
    """(N, h, w) bool: which cells count as the object."""
    boxes: Sequence[PixelBox | None]
    """One predicted box an image, in pixels of the input."""


def maps_of(masks: np.ndarray, size: int, *, compat: Compat = None) -> Maps:
    """The maps and boxes of soft masks (N, h, w) for inputs of ``size``: binarised at the mean, largest component."""
    if compat == "published":  # its boxes lose a row and a column of the input, not of the native mask
        masks = mask_statistics.upsample_nearest(masks, size)
    return maps_of_binary(masks, np.stack([binarize(mask, compat=compat) for mask in masks]), size, compat=compat)


def maps_of_binary(masks: np.ndarray, binary: np.ndarray, size: int, *, compat: Compat = None) -> Maps:
    """The same when it is known which cells count."""
    boxes = [component_box(cells, compat=compat) for cells in binary]
    scaled = [None if box is None else scale_box(box, binary.shape[1:], size) for box in boxes]
    return Maps(masks=masks, binary=binary, boxes=scaled)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is known of the N images of a batch."""

    boxes: Sequence[np.ndarray | None]
    """(k, 4) each, in pixels of the input, perhaps beyond it; None for an image without annotation."""
    masks: Sequence[np.ndarray | None]
    """(S, S) uint8 each: 1 foreground, 0 background, 255 ignored."""
    top1: np.ndarray
    """(N,) bool: the classifier's first guess is right."""
    top5: np.ndarray
    """(N,) bool: the class is among its first five."""


def top_correct(logits: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Whether the logit ``targets`` (N,) is the largest, and among the largest five, of all (N, C): two (N,) bool."""
    found = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]  # (N, 5)
    return found[:, 0].cpu().numpy(), found.any(dim=1).cpu().numpy()


class Tally:
    """Numbers of one method over a data set."""

    def __init__(self, *, size: int, compat: Compat = None) -> None:
        self.size = size
        self.compat: Compat = compat
        self.pixels = PixelPrecision(step=PUBLISHED_STEP) if compat == "published" else PixelPrecision()
        self.boxes = MaxBoxAcc(size=size, compat=compat)
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in (*PER_IMAGE, BOX_IOU)}

    def add(self, maps: Maps, truth: Truth, saliency: SaliencyMetric | None) -> None:
        """Add one batch."""
        columns = {
            "top1": truth.top1,
            "top5": truth.top5,
            "mask_mean": maps.masks.mean(axis=(1, 2), dtype=np.float64),
            "binarized": maps.binary.mean(axis=(1, 2)),
            "entropy": mask_statistics.entropy(maps.masks, compat=self.compat),
            "tv": mask_statistics.total_variation(maps.masks, self.size),
        }
        if saliency is not None:
            columns |= {"SM1": saliency.sm1, "SM2": saliency.sm2, "SM": saliency.sm1 - saliency.sm2}
            columns["sm_acc"] = saliency.correct
        rows = [self._locate(maps, truth, index) for index in range(len(maps.masks))]
        columns |= {name: np.array([row[name] for row in rows]) for name in rows[0]}
        for name, column in self._columns.items():
            values = columns.get(name)
            column.append(np.full(len(rows), np.nan) if values is None else np.asarray(values, dtype=np.float64))

    def _locate(self, maps: Maps, truth: Truth, index: int) -> dict[str, float]:
        """The numbers of one image that need a true box or mask; nan without one."""
        mask, pixels, boxes = maps.masks[index], truth.masks[index], truth.boxes[index]
        row: dict[str, float] = dict.fromkeys(("OM", "LE", "F1", "F1a", "mask_iou", BOX_IOU), np.nan)
        if pixels is not None:
            self.pixels.add(mask, pixels)
            row["mask_iou"] = mask_statistics.mask_iou(maps.binary[index], pixels)
        if boxes is not None and self.compat is None:
            boxes = clip_boxes(boxes, self.size)
            boxes = boxes[box_areas(boxes) > 0]  # what the crop has cut away cannot be asked for
        if boxes is None or not len(boxes):
            return row
        iou = float(box_ious(maps.boxes[index], boxes, self.size, compat=self.compat).max())
        hit = iou > HIT_IOU
        f1 = soft_f1(mask, boxes, self.size, compat=self.compat)
        self.boxes.add(mask, boxes)
        row |= {BOX_IOU: iou, "LE": float(not hit), "OM": float(not (hit and truth.top1[index]))}
        return row | {"F1": float(f1.max()), "F1a": float(f1.mean())}

    def table(self) -> dict[str, np.ndarray]:
        """One column (n,) per metric of `PER_IMAGE` and `BOX_IOU`, in the order of the images; nan: no value."""
        return {name: np.concatenate(column) for name, column in self._columns.items()}

    def summary(self, *, batch_size: int) -> dict[str, float | int | None]:
        """All `METRICS`; None where the truth for one is missing."""
        table = self.table()
        known = {name: column[np.isfinite(column)] for name, column in table.items()}
        means: dict[str, float] = {
            name: float(values.mean()) if len(values) else np.nan for name, values in known.items()
        }
        means["PxAP"] = self.pixels.value()
        means["MaxBoxAccV2"] = float(self.boxes.values().mean())
        means["mask_std"] = mask_statistics.spread(table["mask_mean"], batch_size=batch_size, compat=self.compat)
        result: dict[str, float | int | None] = {
            name: means[name] if np.isfinite(means.get(name, np.nan)) else None for name in METRICS
        }
        result["n_images"] = len(table["top1"])
        return result
