"""An evaluation as one self-contained HTML page: figures beside the baselines, and pictures to look at."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from pipeline.data.decode import ImageError
from pipeline.errors import UsageError
from pipeline.evaluate import Evaluation
from pipeline.metrics.examples import Example
from pipeline.metrics.faithfulness import FAITHFULNESS
from pipeline.metrics.localisation import clip_boxes
from pipeline.metrics.masks import upsample_nearest
from pipeline.metrics.tally import BOX_IOU, Maps, PixelBox
from pipeline.pages import render
from pipeline.training import Normaliser

TILE = 192
"""Side of a picture in the gallery, in pixels."""
JPEG_QUALITY = 78
TYPICAL, EXTREME = 12, 6
"""Images drawn at random, and images at either end."""
PREDICTED, TRUE = (255, 128, 0), (0, 205, 235)
"""Colours of the boxes, R, G, B: apart for colour-blind readers too."""
COLUMNS = ("LE", "OM", "F1", "SM", "PxAP", "MaxBoxAccV2", "mask_iou", "mask_mean")
LOWER_IS_BETTER = ("LE", "OM", "SM", "deletion", "average_drop")
METHODS = {
    "model": "this model",
    "cam": "CAM",
    "gaussian": "Gaussian",
    "center": "centre box",
    "whole": "whole image",
}


class Tile(NamedTuple):
    """One picture of the gallery."""

    caption: str
    source: str
    """A data URI."""


class Card(NamedTuple):
    """One image of the gallery with what the model says about it."""

    title: str
    note: str
    right: bool
    tiles: list[Tile]


def write_report(evaluation: Evaluation, path: str | Path) -> None:
    """Write the page.

    Raises:
        UsageError: ``path`` cannot be written.
    """
    page = render(
        "report.html",
        filters={"percent": percent},
        spec=evaluation.scorer.spec,
        metrics=evaluation.metrics,
        table=figure_table(evaluation.metrics, COLUMNS),
        faithful=figure_table(evaluation.metrics, FAITHFULNESS),
        bars=error_bars(evaluation.metrics),
        areas=area_histogram(evaluation.scorer.tables()["model"]["mask_mean"]),
        classes=class_rows(evaluation),
        groups=gallery(evaluation),
        colours={"predicted": css(PREDICTED), "truth": css(TRUE)},
    )
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; give a writable --report") from error


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in per cent; a dash for none."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def css(colour: tuple[int, int, int]) -> str:
    return "rgb({}, {}, {})".format(*colour)


def figure_table(metrics: dict[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """Columns that have a value, and one row per method with value, interval and whether it is the best one."""
    rows = {"model": metrics, **metrics["baselines"]}
    columns = [name for name in wanted if metrics.get(name) is not None]
    best = {}
    for name in columns:
        values = [row[name] for row in rows.values() if row[name] is not None]
        best[name] = min(values) if name in LOWER_IS_BETTER else max(values)
    best.pop("mask_mean", None)  # a larger mask is not a better one

    def cell(row: dict[str, Any], name: str) -> dict[str, Any]:
        value, ends = row[name], row["intervals"].get(name)
        write = (lambda v: f"{v:.2f}") if name == "SM" else percent
        return {
            "text": "–" if value is None else write(value),
            "ends": "" if ends is None else f"{write(ends[0])} to {write(ends[1])}",
            "best": value is not None and value == best.get(name),
        }

    return {
        "columns": columns,
        "rows": [(METHODS[key], [cell(rows[key], name) for name in columns]) for key in METHODS],
    }


def error_bars(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Localisation error of every method, for a bar chart; empty without true boxes."""
    rows = {"model": metrics, **metrics["baselines"]}
    return [
        {"name": METHODS[key], "value": row["LE"], "low": row["intervals"]["LE"][0], "high": row["intervals"]["LE"][1]}
        for key, row in ((key, rows[key]) for key in METHODS)
        if row["LE"] is not None
    ]


def area_histogram(areas: np.ndarray) -> dict[str, Any]:
    """Shares of images in twenty bins of mask area over [0, 1]."""
    counts, _ = np.histogram(areas, bins=20, range=(0.0, 1.0))
    return {"heights": (counts / max(counts.max(), 1)).tolist(), "counts": counts.tolist()}


def class_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Per class: images, LE of the model and of CAM, top-1, mean mask area; hardest first."""
    tables = evaluation.scorer.tables()
    labels = np.array(evaluation.scorer.labels)
    rows = []
    for label, name in enumerate(evaluation.scorer.spec.data_classes):
        chosen = labels == label
        if not chosen.any():
            continue

        def mean(method: str, metric: str, chosen: np.ndarray = chosen) -> float | None:
            values = tables[method][metric][chosen]
            values = values[np.isfinite(values)]
            return float(values.mean()) if len(values) else None

        rows.append(
            {
                "name": name.replace("_", " "),
                "n": int(chosen.sum()),
                "le": mean("model", "LE"),
                "cam": mean("cam", "LE"),
                "top1": mean("model", "top1"),
                "area": mean("model", "mask_mean"),
            }
        )
    return sorted(rows, key=lambda row: -1.0 if row["le"] is None else -row["le"])


def gallery(evaluation: Evaluation, *, seed: int = 0) -> list[tuple[str, str, list[Card]]]:
    """(title, explanation, cards) of the groups: images drawn at random, the best ones, the worst ones."""
    tables = evaluation.scorer.tables()["model"]
    ious = tables[BOX_IOU] if np.isfinite(tables[BOX_IOU]).any() else tables["mask_iou"]
    count = len(ious)
    drawn = np.random.default_rng([seed, 0x9A11]).permutation(count)[:TYPICAL]
    groups: list[tuple[str, str, Sequence[int] | np.ndarray]] = [
        ("Typical", "Drawn at random, not chosen.", sorted(drawn))
    ]
    known = np.flatnonzero(np.isfinite(ious))
    if len(known):
        order = known[np.argsort(ious[known], kind="stable")]
        groups.append(("Best", "Highest overlap with the truth.", order[::-1][:EXTREME]))
        groups.append(("Worst", "Lowest overlap with the truth.", order[:EXTREME]))
    return [(title, text, cards(evaluation, positions)) for title, text, positions in groups]


def cards(evaluation: Evaluation, positions: Sequence[int] | np.ndarray) -> list[Card]:
    """The cards of some scored images, by their position in the tables."""
    indices = [int(evaluation.rows[position]) for position in positions]
    made: list[Card] = []
    for batch in evaluation.examples.batches(len(indices), indices=indices):
        examples = [example for example in batch if not isinstance(example, ImageError)]
        made += _cards(evaluation, examples, positions[len(made) :])
    return made


def _cards(evaluation: Evaluation, examples: list[Example], positions: Sequence[int] | np.ndarray) -> list[Card]:
    scorer = evaluation.scorer
    spec = scorer.spec
    x = Normaliser(spec.mean, spec.std, scorer.device)(np.stack([example.image for example in examples]))
    logits, masks = scorer.look(x, scorer.targets(spec.class_index, np.array([example.label for example in examples])))
    scores, guesses = (value.tolist() for value in logits.softmax(1).max(1))
    maps = scorer.maps(x, masks)
    ious = scorer.tables()["model"][BOX_IOU]
    made = []
    for k, example in enumerate(examples):
        target = spec.class_index[example.label]
        right = guesses[k] == target
        guess = spec.class_names[guesses[k]].split(",")[0].replace("_", " ")
        iou = ious[positions[k]]
        note = f"{guess} {100 * scores[k]:.0f} % · area {100 * masks[k].mean():.0f} %"
        made.append(
            Card(
                title=spec.data_classes[example.label].replace("_", " "),
                note=note + (f" · IoU {iou:.2f}" if np.isfinite(iou) else ""),
                right=right,
                tiles=tiles(example, maps["model"], maps["cam"], k, spec.mean),
            )
        )
    return made


def tiles(example: Example, model: Maps, cam: Maps, k: int, mean: tuple[float, float, float]) -> list[Tile]:
    """Image with true boxes, mask, CAM, and the masked-in picture."""
    size = example.image.shape[0]
    true = [] if example.boxes is None else [tuple(box) for box in clip_boxes(example.boxes, size).tolist()]
    mask, activation = (upsample_nearest(maps.masks[k], size) for maps in (model, cam))
    fill = 255 * np.array(mean, dtype=np.float32)
    shown = mask[..., None] * example.image + (1 - mask[..., None]) * fill
    return [
        Tile("image", picture(example.image, true=true)),
        Tile("mask", picture(heat(example.image, mask), predicted=model.boxes[k], true=true)),
        Tile("CAM", picture(heat(example.image, activation), predicted=cam.boxes[k], true=true)),
        Tile("kept", picture(shown.astype(np.uint8))),
    ]


def heat(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An image (S, S, 3) uint8 in grey with the mask (S, S) in [0, 1] laid over it in colour."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    levels = (255 * np.clip(mask, 0, 1)).astype(np.uint8)
    colours = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    return cv2.addWeighted(grey, 0.5, colours, 0.5, 0)


def picture(image: np.ndarray, *, predicted: PixelBox | None = None, true: Sequence[Sequence[float]] = ()) -> str:
    """A square image (S, S, 3) uint8 with boxes in its pixels, as a small JPEG in a data URI."""
    scale = TILE / image.shape[0]
    canvas = cv2.resize(image, (TILE, TILE), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    for box, colour in [*((box, TRUE) for box in true), *([(predicted, PREDICTED)] if predicted is not None else [])]:
        x0, y0, x1, y1 = (round(edge * scale) for edge in box)
        corners = (x0, y0), (min(x1, TILE) - 1, min(y1, TILE) - 1)
        cv2.rectangle(canvas, *corners, colour, 3)
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    encoded = cv2.imencode(".jpg", cv2.cvtColor(canvas, cv2.COLOR_RGB2BGR), options)[1]
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode()}"
