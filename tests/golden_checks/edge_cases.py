"""Section 3: what the published code makes of degenerate masks, and what this one makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.metrics.boxes import binarize, mask_box, mean_threshold
from tests.golden_checks._golden import GoldenJson

UNDEFINED = "uninitialised memory"
"""What the recording says of the rectangle of a mask without a box."""

SHAPES: dict[str, Callable[[np.ndarray], Any]] = {
    "single pixel (row 100, col 50)": lambda m: m.__setitem__((100, 50), 1),
    "one row, 10 columns 50..59": lambda m: m.__setitem__((100, slice(50, 60)), 1),
    "all ones but one corner": lambda m: (m.fill(1), m.__setitem__((0, 0), 0)),
    "two 10x10 squares touching diagonally (4-connectivity separates them; the first wins the tie)": lambda m: (
        m.__setitem__((slice(10, 20), slice(10, 20)), 1),
        m.__setitem__((slice(20, 30), slice(20, 30)), 1),
    ),
    "20x20 and 31x31 squares": lambda m: (
        m.__setitem__((slice(10, 30), slice(10, 30)), 1),
        m.__setitem__((slice(100, 131), slice(100, 131)), 1),
    ),
}


CONSTANTS = (0.0, 1.0, 0.5, 0.3, 0.1, 0.7, 0.3333)


def check(golden: GoldenJson) -> None:
    cases = {*SHAPES, *(f"constant {value:.4f}" for value in CONSTANTS)}
    lacking = cases - {golden[key]["case"] for key in golden}
    assert not lacking, f"no record of {sorted(lacking)}"
    for key in golden:
        check_case(golden[key])


def check_case(record: dict[str, Any]) -> None:
    case = record["case"]
    mask = described(case)
    assert abs(mean_threshold(mask, compat="published") - record["mean_f32"]) < 1e-7, case
    assert int(binarize(mask, compat="published").sum()) == record["binarized_pixels"], case
    box = mask_box(mask, compat="published")
    assert box is not None and list(box) == record["box"], case
    x0, y0, x1, y1 = box
    area = mask[y0:y1, x0:x1].size
    assert area == record["box_area"], case
    if record["box_pixels"] != UNDEFINED:
        assert area == record["box_pixels"], case

    # Right by default: no box where nothing stands out, else the published one with its last row and column.
    expected = (x0, y0, x1 + 1, y1 + 1)
    assert mask_box(mask) == (None if mask.min() == mask.max() else expected), case


def described(case: str) -> np.ndarray:
    """The mask that the words describe, (224, 224) float32."""
    mask = np.zeros((224, 224), dtype=np.float32)
    if case in SHAPES:
        SHAPES[case](mask)
    else:
        word, value = case.split()
        assert word == "constant", f"edge case {case!r} is not one that this checker can draw"
        mask.fill(1 / 3 if value == "0.3333" else float(value))  # the recording rounds the name, not the value
    return mask
