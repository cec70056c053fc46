"""The figures by which two engines are compared: of tensors, and of the explanations that are made from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from export.engine import Engine, as_soft_mask
from export.gate_images import GateImages
from pipeline.metrics.boxes import binarize

STORED_LEVELS = 255
"""Masks are stored as bytes; ranks are compared at that resolution, below which a saturated mask is only rounding."""

CLEARLY = 0.7
"""Where masks fit better elsewhere, their difference there is less than this share of what it is without a move."""

_COMPARED = 12
"""About so many images are run again at each small batch size."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What an engine said about n images."""

    logits: np.ndarray
    """(n, C) float32."""
    masks: np.ndarray
    """(n, h, w) float32 in [0, 1]."""


def answers(engine: Engine, images: np.ndarray, *, batch: int, progress: Callable[[int], Any] | None = None) -> Answers:
    """Run ``images`` (n, S, S, 3) uint8 in batches of ``batch``."""
    logits, masks = [], []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        some_logits, some_masks = engine.infer(part)
        logits.append(some_logits)
        masks.append(some_masks)
        if progress:
            progress(len(part))
    return Answers(logits=np.concatenate(logits), masks=np.concatenate(masks))


def mask_iou(first: np.ndarray, second: np.ndarray) -> float:
    """IoU of two soft masks (h, w) as they are stored, each binarised at its own mean as boxes are; 1 when neither has a
    cell above it.  In a nearly constant mask the last bit of a float decides what is above the mean; stored levels do not.
    """
    one, two = (binarize(np.round(np.nan_to_num(mask) * STORED_LEVELS)) for mask in (first, second))
    union = np.logical_or(one, two).sum()
    return float(np.logical_and(one, two).sum() / union) if union else 1.0


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's correlation of the cells of two soft masks (h, w) as they are stored; 1 for two constant ones."""
    stored = [np.round(np.nan_to_num(mask) * STORED_LEVELS) for mask in (first, second)]
    constant = [bool(mask.min() == mask.max()) for mask in stored]
    if any(constant):
        return float(all(constant))
    one, two = (rankdata(mask) for mask in stored)
    return float(np.corrcoef(one, two)[0, 1])


def per_image(reference: Answers, tested: Answers) -> dict[str, np.ndarray]:
    """One number (n,) an image: differences of logits and mask, agreement of class, mask and ranks."""
    logits = np.abs(tested.logits.astype(np.float64) - reference.logits)
    masks = np.abs(tested.masks.astype(np.float64) - reference.masks)
    pairs = list(zip(reference.masks, tested.masks, strict=True))
    return {
        "logits_max_abs": logits.max(1),
        "logits_mean_abs": logits.mean(1),
        "mask_max_abs": masks.max((1, 2)),
        "mask_mean_abs": masks.mean((1, 2)),
        "top1_same": (reference.logits.argmax(1) == tested.logits.argmax(1)).astype(np.float64),
        "mask_iou": np.array([mask_iou(*pair) for pair in pairs]),
        "rank_correlation": np.array([rank_correlation(*pair) for pair in pairs]),
    }


def summarise(columns: dict[str, np.ndarray], reference: Answers) -> dict[str, float]:
    """The figures of `per_image` over all images.

    ``logits_max_rel``: the largest difference of a logit in units of the standard deviation of the reference's logits.
    """
    deviation = float(reference.logits.std()) or 1.0
    return {
        "logits_max_abs": float(columns["logits_max_abs"].max()),
        "logits_mean_abs": float(columns["logits_mean_abs"].mean()),
        "logits_max_rel": float(columns["logits_max_abs"].max()) / deviation,
        "logits_mean_rel": float(columns["logits_mean_abs"].mean()) / deviation,
        "mask_max_abs": float(columns["mask_max_abs"].max()),
        "mask_mean_abs": float(columns["mask_mean_abs"].mean()),
        "top1_agreement": float(columns["top1_same"].mean()),
        "mask_iou": float(columns["mask_iou"].mean()),
        "mask_iou_min": float(columns["mask_iou"].min()),
        "rank_correlation": float(columns["rank_correlation"].mean()),
        "rank_correlation_min": float(columns["rank_correlation"].min()),
    }


def localisation(found: Answers, images: GateImages, size: int) -> dict[str, float]:
    """LE, F1 and, where classes are known, OM of the images that have boxes (`pipeline.metrics.tally`)."""
    from pipeline.metrics.tally import Tally, Truth, maps_of

    chosen = [k for k, boxes in enumerate(images.boxes) if boxes is not None]
    if not chosen:
        return {}
    targets = images.targets[chosen] if images.targets is not None else None
    correct = found.logits[chosen].argmax(1) == targets if targets is not None else np.ones(len(chosen), dtype=bool)
    tally = Tally(size=size)
    truth = Truth(boxes=[images.boxes[k] for k in chosen], masks=[None] * len(chosen), top1=correct, top5=correct)
    tally.add(maps_of(np.nan_to_num(found.masks[chosen]), size), truth, None)
    table = tally.table()
    names = ["LE", "F1"] + (["OM"] if targets is not None else [])
    return {name: float(np.nanmean(table[name])) for name in names}


def further_outputs(reference: Engine, tested: Engine, images: np.ndarray) -> dict[str, float]:
    """Largest difference of each mask output beside the native one: up-sampled, and of the first k classes.

    A class counts where both have it at the same rank; without any such, the difference is 1.
    """
    expected, found = reference.outputs(images), tested.outputs(images)
    worst = {}
    for name in sorted(expected.keys() - {"logits", "mask", "topk_labels"}):
        apart = np.abs(as_soft_mask(expected[name]) - as_soft_mask(found[name]))
        if name == "topk_masks":
            apart = apart[expected["topk_labels"] == found["topk_labels"]]
        worst[name] = float(apart.max()) if apart.size else 1.0
    return worst


def displacement(reference: Answers, tested: Answers) -> int:
    """By how many cells, 0 or 1, the masks of one engine have to be moved to fit those of the other best.

    Rounding has no direction, so this tells a shift from it at any precision.  Masks count as they are stored, all images
    together, without the cells at the edge; flat ones, which fit about as well anywhere, and those of fewer than 4 cells a
    side are not shifted (0).
    """
    one, two = (np.round(np.nan_to_num(found.masks) * STORED_LEVELS) for found in (reference, tested))
    height, width = one.shape[1:]
    if min(height, width) < 4:
        return 0
    inside = two[:, 1:-1, 1:-1]
    apart = {
        (down, right): np.abs(one[:, 1 + down : height - 1 + down, 1 + right : width - 1 + right] - inside).sum()
        for down in (0, -1, 1)
        for right in (0, -1, 1)
    }
    best = min(apart, key=lambda move: apart[move])
    return max(abs(step) for step in best) if apart[best] < CLEARLY * apart[0, 0] else 0


def other_sizes(reference: Engine, tested: Engine, images: np.ndarray) -> dict[str, dict[str, float]]:
    """Largest differences at sizes that are not the input's, for graphs that take any; keyed `HxW`.

    The pictures are ``images`` (n, S, S, 3), continued beyond their edges.  Named as in `summarise`.
    """
    side = images.shape[1]
    names = ("logits_max_rel", "logits_mean_rel", "mask_max_abs", "mask_mean_abs")
    found = {}
    for height, width in ((side, 2 * side - 5), (side + side // 2 + 1, side), (2 * side + 3, side + 9)):
        larger = np.pad(images[:2], ((0, 0), (0, height - side), (0, width - side), (0, 0)), mode="wrap")
        one, two = answers(reference, larger, batch=2), answers(tested, larger, batch=2)
        if one.masks.shape != two.masks.shape:
            found[f"{height}x{width}"] = dict.fromkeys(names, float("inf"))
            continue
        figures = summarise(per_image(one, two), one)
        found[f"{height}x{width}"] = {name: figures[name] for name in names}
    return found


def batch_sizes(wanted: Sequence[int], limit: int) -> list[int]:
    """The batch sizes to compare: 1, even and odd ones, and ``wanted`` (opt, max), none above ``limit``."""
    return sorted({min(size, limit) for size in (1, 2, 3, 7, *wanted)})


def batch_invariance(engine: Engine, images: np.ndarray, sizes: list[int]) -> dict[str, Any]:
    """Whether an answer depends on the batch that the image comes in.

    ``images``: (n, S, S, 3), repeated where the largest size asks for more.  Differences of logits are in units of
    their standard deviation; each figure is the larger one of logits' and mask's.  A mask that the graph gives as bytes
    may differ by one level, which is what the least rounding before it can make.

    ``equal_rows``: among the rows of one batch of the same image, at every size.  ``order``: between a batch and the
    same batch in reverse.  ``by_size``: between the largest size and each other one.
    """
    most = max(sizes)
    images = images[np.arange(most) % len(images)]
    whole = answers(engine, images, batch=most)
    deviation = float(whole.logits.std()) or 1.0
    level = 1 / STORED_LEVELS if engine.outputs(images[:1])["mask"].dtype == np.uint8 else 0.0

    def apart(one: Answers, two: Answers) -> float:
        logits = np.abs(one.logits.astype(np.float64) - two.logits).max() / deviation
        masks = np.abs(one.masks.astype(np.float64) - two.masks).max()
        return float(np.maximum(logits, masks - level))  # a NaN in either one has to come out

    equal_rows = {}
    for size in sizes:
        rows = answers(engine, np.repeat(images[:1], size, axis=0), batch=size)
        first = Answers(logits=rows.logits[:1], masks=rows.masks[:1])
        equal_rows[str(size)] = apart(rows, first)
    reverse = answers(engine, np.ascontiguousarray(images[::-1]), batch=most)
    order = apart(Answers(logits=reverse.logits[::-1], masks=reverse.masks[::-1]), whole)
    by_size = {}
    for size in sizes[:-1]:
        count = min(size * max(1, _COMPARED // size), most)
        some = answers(engine, images[:count], batch=size)
        by_size[str(size)] = apart(some, Answers(logits=whole.logits[:count], masks=whole.masks[:count]))
    return {"equal_rows": equal_rows, "order": order, "by_size": by_size}
