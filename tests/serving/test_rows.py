"""The columns of the batch output are a contract."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from serving import codec
from serving.rows import SCHEMA, Seen, failed_row, scored_row, top_classes

NAMES = ["cat", "dog", "cow"]


def seen(view: tuple[float, float, float, float] = (0.0, 0.0, 30.0, 20.0)) -> Seen:
    return Seen(pixels=np.zeros((8, 8, 3), dtype=np.uint8), view=view, width=30, height=20)


def test_columns_are_frozen() -> None:
    assert [(field.name, str(field.type)) for field in SCHEMA] == [
        ("uri", "string"),
        ("status", "string"),
        ("error", "string"),
        ("width", "int32"),
        ("height", "int32"),
        ("label", "int32"),
        ("class_name", "string"),
        ("score", "float"),
        ("mask", "binary"),
        ("mask_height", "int32"),
        ("mask_width", "int32"),
        ("area", "float"),
        ("box", "fixed_size_list<item: float>[4]"),
        ("view", "fixed_size_list<item: float>[4]"),
        ("engine", "string"),
    ]


def test_row_of_a_scored_image() -> None:
    mask = np.zeros((4, 4), dtype=np.float32)
    mask[0, 0], mask[2:4, 1:3] = 0.4, 0.9
    row = scored_row("a.jpg", seen(), np.array([1.0, 3.0, 2.0], dtype=np.float32), mask, class_names=NAMES, engine="e")
    assert set(row) == set(SCHEMA.names)
    assert (row["label"], row["class_name"], row["status"], row["error"]) == (1, "dog", "ok", None)
    assert abs(row["score"] - np.exp(3) / np.exp([1, 3, 2]).sum()) < 1e-7
    assert row["box"] == [7.5, 10.0, 22.5, 20.0]
    assert row["box"] == list(codec.box(row))
    assert abs(row["area"] - codec.area(row)) < 1e-7
    table = pa.Table.from_pylist([row, failed_row("b.jpg", "undecodable: no", engine="e")], schema=SCHEMA)
    assert table.to_pylist()[1]["box"] is None


def test_a_flat_mask_has_no_box_and_no_nan() -> None:
    flat = np.full((4, 4), 0.3, dtype=np.float32)
    row = scored_row("a.jpg", seen(), np.zeros(3, dtype=np.float32), flat, class_names=NAMES, engine="e")
    assert row["box"] is None
    assert row["label"] == 0
    assert np.isfinite([row["score"], row["area"]]).all()


def test_best_classes_first_and_ties_by_label() -> None:
    best = top_classes(np.array([1.0, 5.0, 5.0], dtype=np.float32), 2, class_names=NAMES)
    assert [item["label"] for item in best] == [1, 2]
    assert len(top_classes(np.zeros(3, dtype=np.float32), 10, class_names=NAMES)) == 3
