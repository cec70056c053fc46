"""Boxes and masks: the contract's tables and files, and what a wrong row says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.annotations import Annotations, read_boxes, read_mask
from pipeline.errors import UsageError

HEADER = "path,class,x0,y0,x1,y1,w,h"


def table(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "boxes.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_boxes(tmp_path):
    boxes = read_boxes(
        table(
            tmp_path,
            "val/a/1.jpg,a,0,0,10,20,10,20",
            "val/b/2, ü.jpg".join('""') + ",b,1.5,2,3,4,9,9",
            "val/a/1.jpg,a,1,2,3,4,10,20",
        )
    )
    assert set(boxes) == {"val/a/1.jpg", "val/b/2, ü.jpg"}
    assert boxes["val/a/1.jpg"].tolist() == [[0, 0, 10, 20], [1, 2, 3, 4]] and boxes["val/a/1.jpg"].dtype == np.float64
    assert boxes["val/b/2, ü.jpg"].tolist() == [[1.5, 2, 3, 4]]
    assert boxes.sizes == {"val/a/1.jpg": (10, 20), "val/b/2, ü.jpg": (9, 9)}


def test_columns_in_another_order_more_of_them_and_a_byte_order_mark(tmp_path):
    path = table(tmp_path, "20,10,cat,8,6,4,2,a.jpg,more", header="\ufeffh,w,class,y1,x1,y0,x0,path,extra")
    assert read_boxes(path)["a.jpg"].tolist() == [[2, 4, 6, 8]]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("a.jpg,a,0,0,ten,2,10,20", "'ten'"),
        ("a.jpg,a,0,0,,2,10,20", "x1 is empty"),
        ("a.jpg,a,0,0,1,2", "w is empty"),
        ("a.jpg,a,3,0,3,2,10,20", "0 <= x0 < x1 <= w"),
        ("a.jpg,a,0,0,11,2,10,20", "10 x 20 image"),
        ("a.jpg,a,-1,0,5,2,10,20", "is not inside"),
        ("a.jpg,a,0,0,nan,2,10,20", "is not inside"),
        ("a.jpg,a,0,0,5,2,10.5,20", "10.5"),
        ("ok.jpg,a,0,0,5,2,11,20", "(10, 20) in an earlier row"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, says):
    path = table(tmp_path, "ok.jpg,a,0,0,1,2,10,20", row)
    with pytest.raises(UsageError) as caught:
        read_boxes(path)
    assert f"{path} line 3" in str(caught.value) and says in str(caught.value) and "\n" not in str(caught.value)


def test_unusable_tables(tmp_path):
    with pytest.raises(UsageError, match="no file"):
        read_boxes(tmp_path / "nowhere.csv")
    with pytest.raises(UsageError, match="no column 'w'"):
        read_boxes(table(tmp_path, "a", header="path,class,x0,y0,x1,y1"))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UsageError, match="UTF-8"):
        read_boxes(tmp_path / "binary.csv")


STORED = np.array([[0, 8, 15], [255, 8, 1]], np.uint8)


def save(path: Path, array: np.ndarray, *, palette: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    if palette:
        picture.putpalette(list(range(256)) * 3)
    picture.save(path)
    return path


@pytest.mark.parametrize("palette", [False, True])
def test_mask_values(tmp_path, palette):
    path = save(tmp_path / "m.png", STORED, palette=palette)
    assert read_mask(path, 8).tolist() == [[0, 1, 0], [255, 1, 0]]
    assert read_mask(path).tolist() == [[0, 1, 1], [255, 1, 1]]
    assert read_mask(path, 0).tolist() == [[1, 0, 0], [255, 0, 0]]
    assert read_mask(path).dtype == np.uint8


def test_bilevel_mask_has_nothing_ignored(tmp_path):
    assert read_mask(save(tmp_path / "m.png", STORED == 8)).tolist() == [[0, 1, 0], [0, 1, 0]]


def test_unusable_masks(tmp_path):
    with pytest.raises(UsageError, match="255"):
        read_mask(save(tmp_path / "m.png", STORED), 255)
    with pytest.raises(UsageError, match="mode RGB"):
        read_mask(save(tmp_path / "rgb.png", np.zeros((2, 2, 3), np.uint8)))
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(UsageError, match=r"text\.png"):
        read_mask(tmp_path / "text.png")


def test_annotations_of_a_data_root(tmp_path):
    table(tmp_path, "val/a/1.x.jpg,a,0,0,1,2,3,2")
    save(tmp_path / "masks/val/a/1.x.png", STORED)
    save(tmp_path / "masks/val/a/2.png", STORED)
    (tmp_path / "images.csv").write_text("path,mask_value\nval/a/1.x.jpg,8\nval/a/2.jpg,\n")
    known = Annotations.of(tmp_path)
    assert known.boxes("val/a/1.x.jpg", (3, 2)).tolist() == [[0, 0, 1, 2]]
    assert known.boxes("val/a/2.jpg").shape == (0, 4)
    assert known.mask("val/a/1.x.jpg", (3, 2)).tolist() == [[0, 1, 0], [255, 1, 0]]
    assert known.mask("val/a/2.jpg").tolist() == [[0, 1, 1], [255, 1, 1]]
    assert known.mask("val/a/3.jpg") is None
    with pytest.raises(UsageError, match=r"3 x 2 pixels.*2 x 3"):
        known.boxes("val/a/1.x.jpg", (2, 3))
    with pytest.raises(UsageError, match=r"3 x 2 pixels.*2 x 3"):
        known.mask("val/a/1.x.jpg", (2, 3))


def test_annotations_from_elsewhere(tmp_path):
    known = Annotations.of(tmp_path)
    assert not known.box_table and known.boxes("a.jpg").shape == (0, 4) and known.mask("a.jpg") is None
    other = tmp_path / "other"
    save(other / "val/a/1.png", STORED)
    known = Annotations.of(tmp_path, boxes=table(other, "val/a/1.jpg,a,0,0,1,2,3,2"), masks=other)
    assert known.boxes("val/a/1.jpg").tolist() == [[0, 0, 1, 2]] and known.mask("val/a/1.jpg") is not None
    with pytest.raises(UsageError, match="no file"):
        Annotations.of(tmp_path, boxes=tmp_path / "nowhere.csv")
    with pytest.raises(UsageError, match="no folder of masks"):
        Annotations.of(tmp_path, masks=tmp_path / "nowhere")


def test_bad_mask_value(tmp_path):
    (tmp_path / "images.csv").write_text("path,mask_value\na.jpg,many\n")
    with pytest.raises(UsageError, match=r"images\.csv line 2: mask_value 'many'"):
        Annotations.of(tmp_path)


@pytest.mark.parametrize("name", ["imagenette224", "tinyimagenet16", "vocanimals5"])
def test_tables_of_the_shared_data_sets(shared_dir, name):
    known = Annotations.of(shared_dir / "data" / name)
    assert len(known.box_table) >= 500
    assert len(known.mask_values) == (625 if name == "vocanimals5" else 0)
