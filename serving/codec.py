"""Stored masks: 8-bit grey PNG at the network's native resolution, and what can be asked of one without up-sampling it.

A *row* is a mapping with the columns of `serving.rows.SCHEMA`: a dictionary, a pandas row, or one of `Table.to_pylist()`.
A mask covers the row's `view`, a region in pixels of the upright original; pixels outside the view have no evidence (0).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import cv2
import numpy as np

from pipeline.metrics.boxes import binarize, mask_box

Row = Mapping[str, Any]
Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the upright original; x1 and y1 exclusive."""

PNG_LEVEL = 6
"""zlib level: a mask of 56 x 56 is so small that the level costs nothing."""


def quantize(mask: np.ndarray) -> np.ndarray:
    """Float mask (h, w) in [0, 1] to uint8 (h, w), round(255 m); what is not a number becomes 0."""
    return np.rint(np.clip(np.nan_to_num(mask, nan=0.0), 0.0, 1.0) * 255.0).astype(np.uint8)


def encode_mask(mask: np.ndarray) -> bytes:
    """PNG of a mask (h, w): float in [0, 1], or uint8 as `quantize` gives it."""
    grey = mask if mask.dtype == np.uint8 else quantize(mask)
    return encode_png(grey)


def decode_mask(png: bytes) -> np.ndarray:
    """Mask (h, w) uint8 of a stored PNG."""
    mask = cv2.imdecode(np.frombuffer(png, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if mask is None or mask.ndim != 2 or mask.dtype != np.uint8:
        raise ValueError(f"not a mask: {len(png)} bytes that are no 8-bit grey PNG")
    return mask


def encode_png(image: np.ndarray) -> bytes:
    """PNG of a grey (H, W) or RGB (H, W, 3) uint8 picture."""
    pixels = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    done, png = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, PNG_LEVEL])
    if not done:
        raise ValueError(f"cannot encode a picture of shape {image.shape}")
    return png.tobytes()


def stored(row: Row) -> np.ndarray:
    """The mask of a row as it is stored: (h, w) uint8, native resolution.

    Raises:
        ValueError: the row is that of an image that could not be scored.
    """
    if row["mask"] is None:
        raise ValueError(f"{row['uri']}: no mask, since the image could not be scored ({row['error']})")
    return decode_mask(row["mask"])


def load(row: Row, *, size: tuple[int, int] | None = None, original: bool = False, smooth: bool = False) -> np.ndarray:
    """The mask of a row as float32 in [0, 1].

    Native (h, w) by default; ``size=(H, W)`` up-samples it over the view; ``original=True`` gives (height, width) of the
    upright original, 0 outside the view.  ``smooth`` interpolates linearly instead of by the nearest cell.
    """
    mask = stored(row).astype(np.float32) / 255.0
    if original:
        return _in_original(mask, row["view"], (row["height"], row["width"]), smooth=smooth)
    if size is None:
        return mask
    return cv2.resize(mask, (size[1], size[0]), interpolation=cv2.INTER_LINEAR if smooth else cv2.INTER_NEAREST_EXACT)


def of_class(row: Row, label: int) -> dict[str, Any]:
    """The row as if ``label`` had been predicted: its score, mask, area and box, for every other function here.

    Raises:
        ValueError: the row has no mask of this class (``serving.batch --topk`` stores those of the best).
    """
    best = row.get("topk")
    chosen = next((one for one in (best if best is not None else ()) if one["label"] == label), None)
    if chosen is None:
        known = [one["label"] for one in best] if best is not None else []
        raise ValueError(f"{row['uri']}: no mask of class {label}; the row has those of {known or 'no class'}")
    found = {**row, **chosen}
    return found | {"area": area(found), "box": box(found)}


def stack(pngs: Iterable[bytes]) -> np.ndarray:
    """Masks (N, h, w) uint8 of a column of PNGs, all of one engine: ``stack(table["mask"].drop_null().to_pylist())``."""
    return np.stack([decode_mask(png) for png in pngs])


def area(row: Row, *, threshold: float | None = None) -> float:
    """Share of the view that the mask takes: its mean, or the share of cells above ``threshold`` in [0, 1]."""
    mask = stored(row)
    return float(mask.mean(dtype=np.float64) / 255.0) if threshold is None else float((mask > 255.0 * threshold).mean())


def box(row: Row, *, threshold: float | None = None) -> Box | None:
    """Box of the largest component above the mask's mean, or above ``threshold`` in [0, 1]; None when nothing is."""
    mask = stored(row)
    if threshold is not None:
        above = (mask > 255.0 * threshold).astype(np.uint8)
        # A mask that is above the threshold everywhere has no cell above its own mean, but a box all the same.
        found = (0, 0, mask.shape[1], mask.shape[0]) if above.all() else mask_box(above)
    else:
        found = mask_box(mask)
    return None if found is None else cells_to_original(found, mask.shape, row["view"])


def box_iou(row: Row, other: Box) -> float:
    """Intersection over union of the mask's box and another box in pixels of the upright original; 0 without a box."""
    mine = box(row)
    if mine is None:
        return 0.0
    width = min(mine[2], other[2]) - max(mine[0], other[0])
    height = min(mine[3], other[3]) - max(mine[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (_box_area(mine) + _box_area(other) - shared)


def mask_iou(row: Row, other: Row) -> float:
    """Intersection over union of two masks of one image, each above its own mean; 1 when both are empty."""
    first, second = binarize(stored(row)), binarize(stored(other))
    union = np.count_nonzero(first | second)
    return float(np.count_nonzero(first & second) / union) if union else 1.0


def cells_to_original(cells: tuple[int, int, int, int], shape: tuple[int, ...], view: Iterable[float]) -> Box:
    """A box in mask cells of a mask of ``shape`` (h, w) as a box in pixels of the upright original."""
    x0, y0, x1, y1 = (float(value) for value in view)
    across, down = (x1 - x0) / shape[1], (y1 - y0) / shape[0]
    return x0 + cells[0] * across, y0 + cells[1] * down, x0 + cells[2] * across, y0 + cells[3] * down


def overlay(image: np.ndarray, row: Row, *, opacity: float = 0.5, draw_box: bool = True) -> np.ndarray:
    """Picture (H, W, 3) uint8 RGB with the mask as a heat map over it.

    ``image`` is the upright original or any scaled copy of it; the more evidence, the more of the heat shows.
    """
    height, width = image.shape[:2]
    scale_x, scale_y = width / row["width"], height / row["height"]
    view = [row["view"][0] * scale_x, row["view"][1] * scale_y, row["view"][2] * scale_x, row["view"][3] * scale_y]
    mask = _in_original(stored(row).astype(np.float32) / 255.0, view, (height, width), smooth=True)
    heat = cv2.cvtColor(
        cv2.applyColorMap(np.rint(mask * 255.0).astype(np.uint8), cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB
    )
    weight = (opacity * mask)[..., None]
    drawn = np.rint(image * (1.0 - weight) + heat * weight).astype(np.uint8)
    if draw_box and row["box"] is not None:
        x0, y0, x1, y1 = row["box"]
        corners = (round(x0 * scale_x), round(y0 * scale_y)), (round(x1 * scale_x) - 1, round(y1 * scale_y) - 1)
        line = max(1, round(max(height, width) / 300))
        cv2.rectangle(drawn, *corners, (0, 0, 0), 3 * line)
        cv2.rectangle(drawn, *corners, (255, 255, 255), line)
    return drawn


def _box_area(value: Box) -> float:
    return max(0.0, value[2] - value[0]) * max(0.0, value[3] - value[1])


def _in_original(mask: np.ndarray, view: Iterable[float], shape: tuple[int, int], *, smooth: bool) -> np.ndarray:
    """Mask (h, w) float32 over ``view`` as (H, W) float32 over the picture of ``shape``, by one affine map."""
    x0, y0, x1, y1 = (float(value) for value in view)
    height, width = shape
    across, down = (x1 - x0) / mask.shape[1], (y1 - y0) / mask.shape[0]
    # Centres of the pixels in mask coordinates where cell k covers [k, k + 1).
    columns = ((np.arange(width) + 0.5 - x0) / across).astype(np.float32)
    rows = ((np.arange(height) + 0.5 - y0) / down).astype(np.float32)
    inside_x, inside_y = (columns >= 0) & (columns < mask.shape[1]), (rows >= 0) & (rows < mask.shape[0])
    if smooth:
        tall = _interpolate(mask, rows - 0.5)
        full = _interpolate(tall.T, columns - 0.5).T
    else:
        index_y = np.clip(rows, 0, mask.shape[0] - 1).astype(np.intp)
        index_x = np.clip(columns, 0, mask.shape[1] - 1).astype(np.intp)
        full = mask[index_y][:, index_x]
    return full * (inside_y[:, None] & inside_x[None, :])


def _interpolate(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows of ``values`` (n, m) at fractional positions ``at`` (k,), linearly, the border rows continued: (k, m)."""
    at = np.clip(at, 0, values.shape[0] - 1)
    low = np.floor(at).astype(np.intp)
    high = np.minimum(low + 1, values.shape[0] - 1)
    share = (at - low).astype(np.float32)[:, None]
    return values[low] * (1 - share) + values[high] * share
