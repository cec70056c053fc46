"""The ILSVRC layout in miniature: three classes, training pictures with and without boxes, flat validation pictures."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.annotations import Annotations
from pipeline.data.splits import read_split
from pipeline.errors import UsageError
from pipeline.prepare_imagenet import VALIDATION_IMAGES, main

WNIDS = ("n01440764", "n02102040", "n03888257")
BOXED = 53
"""Boxed training pictures of the first class: more than the split takes."""


def picture(path: Path, size: tuple[int, int] = (40, 30), orientation: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(path, "JPEG", exif=exif)


def annotation(path: Path, *objects: tuple[str, int, int, int, int], size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
        "</bndbox></object>"
        for name, x0, y0, x1, y1 in objects
    )
    size_text = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    path.write_text(f"<annotation>{size_text}{body}</annotation>")


@pytest.fixture
def ilsvrc(tmp_path: Path) -> Path:
    root = tmp_path / "ILSVRC"
    data, boxes = root / "Data" / "CLS-LOC", root / "Annotations" / "CLS-LOC"
    for wnid in WNIDS:
        for k in range(BOXED + 4 if wnid == WNIDS[0] else 6):
            picture(data / "train" / wnid / f"{wnid}_{k}.JPEG")
            if k < (BOXED if wnid == WNIDS[0] else 2):
                annotation(boxes / "train" / wnid / f"{wnid}_{k}.xml", (wnid, 3, 4, 20, 25))
    for k, wnid in enumerate(WNIDS):
        name = f"ILSVRC2012_val_{k + 1:08d}"
        picture(data / "val" / f"{name}.JPEG")
        annotation(
            boxes / "val" / f"{name}.xml", (wnid, 1, 2, 11, 12), ("n09999999", 0, 0, 5, 5), (wnid, 20, 2, 38, 12)
        )
    return root


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_official_validation_set(ilsvrc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main([str(ilsvrc), "--out", str(out)])
    assert "69 training and 3 validation pictures of 3 classes, 63 boxes" in capsys.readouterr().out
    train, val = read_split(out, "train"), read_split(out, "val")
    assert (len(train.paths), val.paths) == (
        69,
        [f"val/{wnid}/ILSVRC2012_val_{k + 1:08d}.JPEG" for k, wnid in enumerate(WNIDS)],
    )
    boxes = Annotations.of(out).boxes(val.paths[0], (40, 30))
    assert boxes.tolist() == [[1, 2, 11, 12], [20, 2, 38, 12]]  # of the picture's own class
    assert rows(out / "class_map.csv") == [{"folder": wnid, "index": str(k)} for k, wnid in enumerate(WNIDS)]
    again = (out / "boxes.csv").read_bytes()
    main([str(ilsvrc), "--out", str(out)])
    assert (out / "boxes.csv").read_bytes() == again


def test_train_validation_takes_fifty_boxed_pictures_of_each_class(ilsvrc: Path, tmp_path: Path) -> None:
    first, same, other = (tmp_path / name for name in ("a", "b", "c"))
    for out, seed in ((first, 1234), (same, 1234), (other, 1)):
        main([str(ilsvrc), "--out", str(out), "--split", "train-validation", "--seed", str(seed)])
    train, val = read_split(first, "train"), read_split(first, "val")
    assert np.bincount(val.labels).tolist() == [VALIDATION_IMAGES, 2, 2]
    assert len(train.paths) + len(val.paths) == 69
    names = {Path(path).name for path in train.paths} & {Path(path).name for path in val.paths}
    assert not names
    assert all(len(Annotations.of(first).boxes(path)) == 1 for path in val.paths)
    assert read_split(same, "val").paths == val.paths
    assert read_split(other, "val").paths != val.paths


def test_boxes_follow_the_file_and_not_a_wrong_size(
    ilsvrc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, boxes = ilsvrc / "Data" / "CLS-LOC" / "train", ilsvrc / "Annotations" / "CLS-LOC" / "train"
    wnid = WNIDS[1]
    annotation(boxes / wnid / f"{wnid}_0.xml", (wnid, 10, 10, 80, 70), size=(80, 60))
    picture(data / wnid / f"{wnid}_1.JPEG", orientation=6)
    main([str(ilsvrc), "--out", str(tmp_path / "out")])
    assert "1 pictures have no box here" in capsys.readouterr().out
    found = Annotations.of(tmp_path / "out")
    assert found.boxes(f"train/{wnid}/{wnid}_0.JPEG", (40, 30)).tolist() == [[5, 5, 40, 30]]
    assert len(found.boxes(f"train/{wnid}/{wnid}_1.JPEG")) == 0


def test_what_is_wrong_is_said(ilsvrc: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give the folder that holds Data/CLS-LOC"):
        main([str(ilsvrc / "Data"), "--out", str(tmp_path / "out")])
    xml = ilsvrc / "Annotations" / "CLS-LOC" / "val" / "ILSVRC2012_val_00000001.xml"
    xml.write_text("<annotation><size><width>x</width>")
    with pytest.raises(UsageError, match=r"00000001\.xml is not an annotation"):
        main([str(ilsvrc), "--out", str(tmp_path / "out")])
    xml.unlink()
    with pytest.raises(UsageError, match="tells its class; unpack the validation boxes"):
        main([str(ilsvrc), "--out", str(tmp_path / "out")])
    blocked = tmp_path / "file"
    blocked.write_text("")
    xml.write_text(xml.with_name("ILSVRC2012_val_00000002.xml").read_text())
    with pytest.raises(UsageError, match="give a folder that can be written"):
        main([str(ilsvrc), "--out", str(blocked)])


def test_nothing_of_the_source_and_of_another_split_is_touched(ilsvrc: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in ilsvrc.rglob("*.JPEG")}
    with pytest.raises(UsageError, match="which is only read; give a new folder beside it"):
        main([str(ilsvrc), "--out", str(ilsvrc / "Data" / "CLS-LOC")])
    main([str(ilsvrc), "--out", str(tmp_path / "out")])
    with pytest.raises(UsageError, match="none of this split's links; give a new folder"):
        main([str(ilsvrc), "--out", str(tmp_path / "out"), "--split", "train-validation"])
    copy = tmp_path / "copy" / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG"
    picture(copy)
    with pytest.raises(UsageError, match="none of this split's links"):
        main([str(ilsvrc), "--out", str(tmp_path / "copy")])
    assert copy.is_file() and not copy.is_symlink()
    assert before == {path: path.read_bytes() for path in ilsvrc.rglob("*.JPEG") if not path.is_symlink()}
