"""The gate's report: one HTML page with the verdict, every figure beside its limit, and the worst images as pictures."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from export.engine import EngineInfo
from export.files import whole
from export.gate import Thresholds, Verdict, batch_figures, size_figures
from export.gate_images import GateImages

WORST_SHOWN = 8
PICTURE_SIDE = 160


def report_paths(html: str | Path) -> tuple[Path, Path]:
    """Where the page and the JSON beside it go."""
    html = Path(html)
    return html, html.with_suffix(".json")


def write_report(
    path: str | Path, verdict: Verdict, images: GateImages, *, model: EngineInfo, engine: EngineInfo, notes: list[str]
) -> Path:
    """Write the page and the JSON beside it; returns the page's path."""
    html, data = report_paths(path)
    record = {
        "model": model.path,
        "engine": engine.path,
        "engine_sha256": engine.sha256,
        "kind": engine.kind,
        "provider": engine.provider,
        "precision": engine.precision,
        "images": images.source,
        "images_sha256": images.sha256,
        "notes": notes,
        **verdict.summary(),
    }
    with whole(html, "--report") as page, whole(data, "--report") as numbers:  # both or none
        strict = json.loads(json.dumps(record), parse_constant=lambda _: None)  # JSON knows no NaN
        numbers.write_text(json.dumps(strict, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        page.write_text(render(record, verdict, images, reference=model.kind), encoding="utf-8")
    return html


def render(record: dict[str, Any], verdict: Verdict, images: GateImages, *, reference: str) -> str:
    """The page as text; ``reference``: what ran the model that the engine is held against."""
    from jinja2 import Environment, FileSystemLoader

    folder = Path(__file__).parent / "templates"
    template = Environment(loader=FileSystemLoader(folder), autoescape=True).get_template("parity.html")
    return template.render(
        record=record, reference=reference, rows=_rows(verdict), worst=_worst(verdict, images, reference)
    )


def _rows(verdict: Verdict) -> list[dict[str, str]]:
    """Every figure with its limit and whether it is kept."""
    limits = {field.name: getattr(verdict.thresholds, field.name) for field in fields(Thresholds)}
    limits |= dict.fromkeys(("dLE", "dOM", "dF1"), limits["drop"])
    failed = {error.figure for error in verdict.errors}
    plain = {name: value for name, value in verdict.figures.items() if name not in ("batch", "outputs", "sizes")}
    shown = [(name, value, limits.get(name)) for name, value in plain.items()]
    shown += [(name, value, limits["mask_max_abs"]) for name, value in verdict.figures.get("outputs", {}).items()]
    shown += [(name, value, limits[kind]) for name, value, kind in size_figures(verdict.figures.get("sizes", {}))]
    if "batch" in verdict.figures:
        shown += [(name, value, limits[kind]) for name, value, kind in batch_figures(verdict.figures["batch"])]
    return [
        {
            "name": name,
            "value": f"{value:.6g}",
            "limit": "" if limit is None else f"{limit:.4g}",
            "state": "failed" if name in failed else ("" if limit is None else "kept"),
        }
        for name, value, limit in shown
    ]


def _worst(verdict: Verdict, images: GateImages, against: str) -> list[dict[str, Any]]:
    """The images whose masks agree least, with pictures."""
    if not verdict.columns:
        return []
    agreement = np.nan_to_num(verdict.columns["mask_iou"]) - np.nan_to_num(verdict.columns["mask_mean_abs"], nan=1.0)
    shown = []
    for index in np.argsort(agreement, kind="stable")[:WORST_SHOWN]:
        reference, tested = verdict.reference.masks[index], verdict.tested.masks[index]
        shown.append(
            {
                "name": images.names[index],
                "same_class": bool(verdict.columns["top1_same"][index]),
                "figures": {
                    name: f"{verdict.columns[name][index]:.4g}"
                    for name in ("mask_iou", "rank_correlation", "mask_mean_abs", "mask_max_abs", "logits_max_abs")
                },
                "pictures": {
                    "image": _png(_with_boxes(images.images[index], images.boxes[index])),
                    against: _png(_heat(reference)),
                    "engine": _png(_heat(tested)),
                    "difference": _png(_heat(np.abs(tested.astype(np.float64) - reference) * 10)),
                },
            }
        )
    return shown


def _heat(mask: np.ndarray) -> np.ndarray:
    """A mask (h, w) in [0, 1] in colours, (h, w, 3) uint8."""
    from matplotlib import colormaps

    return (colormaps["viridis"](np.clip(np.nan_to_num(mask), 0, 1))[..., :3] * 255).astype(np.uint8)


def _with_boxes(image: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
    from PIL import Image, ImageDraw

    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for x0, y0, x1, y1 in boxes if boxes is not None else ():
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=(255, 60, 60))
    return np.asarray(picture)


def _png(picture: np.ndarray) -> str:
    from PIL import Image

    enlarged = Image.fromarray(picture).resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    enlarged.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
