"""Boxes and pixel masks that somebody drew, as tables and files beside the images.

Boxes: a CSV ``path,class,x0,y0,x1,y1,w,h``, one row per box, further columns allowed.  ``path`` is relative to the data
root; the box is in pixels of that image, which is ``w`` x ``h``; x1 and y1 are exclusive.

Masks: ``masks/<split>/<class>/<stem>.png``; foreground is the ``mask_value`` of ``images.csv`` where it is given, else
any value above 0; 255 is ignored.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from pipeline.data import store
from pipeline.errors import UsageError

FOREGROUND, IGNORED = 1, 255
_BOX_COLUMNS = ("path", "class", "x0", "y0", "x1", "y1", "w", "h")
_NO_BOXES = np.zeros((0, 4), np.float64)


class Boxes(dict[str, np.ndarray]):
    """From an image's path, as written in the table, to its boxes: (k, 4) float64 x0, y0, x1, y1 in pixels of it."""

    def __init__(self, boxes: dict[str, np.ndarray], sizes: dict[str, tuple[int, int]]) -> None:
        super().__init__(boxes)
        self.sizes = sizes
        """Width and height of each image, as written in the table."""


def read_boxes(csv_path: str | PathLike[str]) -> Boxes:
    """Read a table of boxes.  A row that cannot be meant raises `UsageError` with file and line."""
    boxes: dict[str, list[tuple[float, ...]]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for where, row in _rows(str(csv_path), _BOX_COLUMNS):
        path = row["path"]
        try:
            x0, y0, x1, y1 = (float(row[name]) for name in ("x0", "y0", "x1", "y1"))
            size = int(row["w"]), int(row["h"])
        except ValueError as error:
            raise UsageError(f"{where}: {error}; x0, y0, x1, y1 are numbers, w and h whole numbers") from error
        if not (0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]):
            raise UsageError(
                f"{where}: box {x0:g},{y0:g},{x1:g},{y1:g} is not inside the {size[0]} x {size[1]} image; "
                "0 <= x0 < x1 <= w and 0 <= y0 < y1 <= h must hold"
            )
        if sizes.setdefault(path, size) != size:
            raise UsageError(f"{where}: {path} has size {size} here but {sizes[path]} in an earlier row; correct one")
        boxes.setdefault(path, []).append((x0, y0, x1, y1))
    return Boxes({path: np.array(rows, np.float64) for path, rows in boxes.items()}, sizes)


def read_mask(path: str | PathLike[str], mask_value: int | None = None) -> np.ndarray:
    """Read a mask file: (H, W) uint8 of 1 foreground, 0 background, 255 ignored.

    mask_value: the stored value that means foreground (palette index or grey level); None: every value from 1 to 254.
    """
    if mask_value == IGNORED:
        raise UsageError(f"mask_value 255 for {path} would mean ignored; name another value in images.csv")
    try:
        with Image.open(path) as picture:
            stored = np.asarray(picture)  # palette indices, where there is a palette
    except Exception as error:
        raise UsageError(f"cannot read the mask {path} ({error}); replace or remove it") from error
    if stored.ndim != 2:
        raise UsageError(f"the mask {path} has mode {picture.mode}; store it as a grey, bilevel or palette PNG")
    mask = (stored == mask_value if mask_value is not None else stored > 0).astype(np.uint8)
    mask[stored == IGNORED] = IGNORED
    return mask


@dataclass(frozen=True)
class Annotations:
    """What is known of the images of a data root; images are named by their path relative to it."""

    root: str
    """A local folder or a remote URI."""
    box_table: Boxes
    mask_folder: Path | None
    """None where there can be none: masks are read from local folders."""
    mask_values: dict[str, int] = field(default_factory=dict)
    """The ``mask_value`` column of ``images.csv``."""

    @classmethod
    def of(
        cls,
        root: str | PathLike[str],
        *,
        boxes: str | PathLike[str] | None = None,
        masks: str | PathLike[str] | None = None,
    ) -> Annotations:
        """Find the annotations of a data root: ``boxes.csv``, ``masks/`` and ``images.csv`` in it, where they exist.

        boxes, masks: a table and a folder (holding ``<split>/<class>/<stem>.png``) to use instead; these must exist.
        """
        place = store.place_of(str(root))
        box_path = store.place_of(str(boxes)) if boxes is not None else store.join(place, "boxes.csv")
        mask_folder = Path(masks) if masks is not None else None if store.is_remote(place) else Path(place) / "masks"
        if masks is not None and not Path(masks).is_dir():
            raise UsageError(f"no folder of masks at {masks}; it should hold <split>/<class>/<stem>.png")
        table = read_boxes(box_path) if boxes is not None or store.exists(box_path) else Boxes({}, {})
        images = store.join(place, "images.csv")
        return cls(place, table, mask_folder, _read_mask_values(images) if store.exists(images) else {})

    def boxes(self, path: str, size: tuple[int, int] | None = None) -> np.ndarray:
        """(k, 4) float64 boxes of an image; k = 0 when none is known.

        size: width and height of the upright picture; when given, the table has to agree with it.
        """
        found = self.box_table.get(path)
        if found is None:
            return _NO_BOXES
        written = self.box_table.sizes[path]
        if size is not None and written != tuple(size):
            raise UsageError(
                f"the boxes of {path} are for a picture of {written[0]} x {written[1]} pixels, but in {self.root} "
                f"it has {size[0]} x {size[1]}; give boxes in pixels of this file"
            )
        return found

    def mask_path(self, path: str) -> Path | None:
        """Where the mask of an image would be; None where there can be none."""
        if self.mask_folder is None or path.startswith("/") or store.is_remote(path):
            return None
        return self.mask_folder / PurePosixPath(path).with_suffix(".png")

    def mask(self, path: str, size: tuple[int, int] | None = None) -> np.ndarray | None:
        """(H, W) uint8 mask of an image as in `read_mask`; None when it has none.  size: as in `boxes`."""
        file = self.mask_path(path)
        if file is None or not file.is_file():
            return None
        mask = read_mask(file, self.mask_values.get(path))
        if size is not None and mask.shape != (size[1], size[0]):
            raise UsageError(
                f"the mask {file} has {mask.shape[1]} x {mask.shape[0]} pixels, but {self.root}/{path} has "
                f"{size[0]} x {size[1]}; masks have the size of their image"
            )
        return mask


def _read_mask_values(csv_path: str) -> dict[str, int]:
    values: dict[str, int] = {}
    for where, row in _rows(csv_path, ("path",)):
        text = (row.get("mask_value") or "").strip()
        if text:
            try:
                values[row["path"]] = int(text)
            except ValueError as error:
                raise UsageError(
                    f"{where}: mask_value {text!r} is not a whole number; correct it or leave it empty"
                ) from error
    return values


def _rows(csv_path: str, required: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ("<file> line <n>", row) of a CSV; the required columns have to be there and filled in every row."""
    if not store.exists(csv_path):
        raise UsageError(f"no file {csv_path}; name an existing table of {','.join(required)}")
    try:
        with store.open_file(csv_path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            missing = [name for name in required if name not in (reader.fieldnames or ())]
            if missing:
                raise UsageError(
                    f"{csv_path} has no column {missing[0]!r}; its first line has to name {','.join(required)}"
                )
            for row in reader:
                where = f"{csv_path} line {reader.line_num}"
                if empty := [name for name in required if not row[name]]:
                    raise UsageError(f"{where}: {empty[0]} is empty; fill it in or remove the row")
                yield where, row
    except (OSError, UnicodeDecodeError, csv.Error, store.ReadError) as error:
        raise UsageError(
            f"cannot read {csv_path} ({error}); it has to be a UTF-8 text of comma-separated values"
        ) from error
