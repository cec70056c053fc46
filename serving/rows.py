"""From one image's engine outputs to the columns of the batch output and the fields of the HTTP answer: one function for
both, so that the two give the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.metrics.boxes import mask_box
from serving.codec import cells_to_original, encode_mask, quantize

SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("label", pa.int32()),
        ("class_name", pa.string()),
        ("score", pa.float32()),
        ("mask", pa.binary()),
        ("mask_height", pa.int32()),
        ("mask_width", pa.int32()),
        ("area", pa.float32()),
        ("box", pa.list_(pa.float32(), 4)),
        ("view", pa.list_(pa.float32(), 4)),
        ("engine", pa.string()),
    ]
)
"""Columns of the batch output, one row per input image; frozen: readers outside rely on it."""

CLASS_MASK = pa.struct(
    [("label", pa.int32()), ("class_name", pa.string()), ("score", pa.float32()), ("mask", pa.binary())]
)
"""One class of the column that `schema` adds: a class as the HTTP answer's ``topk`` has it, with its mask as PNG."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A decoded image as the engine is given it."""

    pixels: np.ndarray
    """(S, S, 3) uint8 RGB, fitted to the input."""
    view: tuple[float, float, float, float]
    """The region that `pixels` shows, in pixels of the upright original."""
    width: int
    """Of the upright original."""
    height: int


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What an engine says of a batch of N images."""

    logits: np.ndarray
    """(N, C) float32."""
    masks: np.ndarray
    """(N, h, w) float32 in [0, 1], of the predicted classes."""
    labels: np.ndarray | None = None
    """(N, k) int64, the best classes, best first, where their masks were asked for."""
    class_masks: np.ndarray | None = None
    """(N, k, h, w) float32 in [0, 1]."""


def schema(topk: int) -> pa.Schema:
    """The columns of an output; with ``topk`` one more, ``topk``: the masks of so many classes, best first."""
    return SCHEMA.append(pa.field("topk", pa.list_(CLASS_MASK))) if topk else SCHEMA


def answer_row(
    uri: str, seen: Seen, answers: Answers, k: int, *, class_names: list[str], engine: str
) -> dict[str, Any]:
    """The row of image ``k`` of a batch, with the masks of its best classes where there are any."""
    row = scored_row(uri, seen, answers.logits[k], answers.masks[k], class_names=class_names, engine=engine)
    if answers.labels is None or answers.class_masks is None:
        return row
    probabilities = softmax(answers.logits[k])
    best = [
        {
            "label": int(label),
            "class_name": class_names[label],
            "score": float(np.float32(probabilities[label])),
            "mask": encode_mask(mask),
        }
        for label, mask in zip(answers.labels[k], answers.class_masks[k], strict=True)
    ]
    return row | {"topk": best}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (C,) float64 of logits (C,)."""
    shifted = np.exp(logits.astype(np.float64) - np.max(logits))
    return shifted / shifted.sum()


def scored_row(
    uri: str, seen: Seen, logits: np.ndarray, mask: np.ndarray, *, class_names: list[str], engine: str
) -> dict[str, Any]:
    """The row of an image that was scored.

    ``logits``: (C,) float32.  ``mask``: (h, w) float32 in [0, 1].  The box is that of the mask as it is stored, in uint8,
    so that a reader of the row finds the same one; it is null when no cell is above the mask's mean.
    """
    probabilities = softmax(logits)
    label = int(np.argmax(logits))
    stored = quantize(mask)
    cells = mask_box(stored)
    return {
        "uri": uri,
        "status": "ok",
        "error": None,
        "width": seen.width,
        "height": seen.height,
        "label": label,
        "class_name": class_names[label],
        "score": float(np.float32(probabilities[label])),
        "mask": encode_mask(stored),
        "mask_height": stored.shape[0],
        "mask_width": stored.shape[1],
        "area": float(np.float32(stored.mean(dtype=np.float64) / 255.0)),
        "box": None
        if cells is None
        else [float(np.float32(v)) for v in cells_to_original(cells, mask.shape, seen.view)],
        "view": [float(np.float32(value)) for value in seen.view],
        "engine": engine,
    }


def failed_row(uri: str, error: str, *, engine: str) -> dict[str, Any]:
    """The row of an image that could not be scored; ``error`` begins with its kind."""
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    return row | {"uri": uri, "status": "error", "error": error, "engine": engine}


def top_classes(logits: np.ndarray, count: int, *, class_names: list[str]) -> list[dict[str, Any]]:
    """The ``count`` most probable classes of logits (C,), best first; of equal ones the lower label first."""
    probabilities = softmax(logits)
    order = np.argsort(-logits.astype(np.float64), kind="stable")[:count]
    return [
        {"label": int(k), "class_name": class_names[k], "score": float(np.float32(probabilities[k]))} for k in order
    ]
