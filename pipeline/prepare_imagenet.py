"""The ILSVRC 2012 folders as a data set of this project's layout: ``python -m pipeline.prepare_imagenet ILSVRC --out DIR``.

``ILSVRC`` holds ``Data/CLS-LOC/{train,val}`` and ``Annotations/CLS-LOC/{train,val}``, as the archives unpack.  ``DIR`` gets
``train/<wnid>/*`` and ``val/<wnid>/*`` as links to the pictures, ``boxes.csv``, and ``class_map.csv`` for a classifier with
the usual 1000 outputs.  Nothing is copied; 1.3 million links are made.

``--split train-validation`` takes as ``val`` at most 50 training pictures of each class that have boxes, and as ``train``
the others: the paper's split for choosing settings (seed 1234).
"""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.cli import Parser, run
from pipeline.data.listing import is_image_name
from pipeline.errors import UsageError

VALIDATION_IMAGES = 50
"""Training pictures of a class that the Train-Validation split takes at most."""
SEED = 1234
ORIENTATION = 0x0112
"""EXIF tag; the boxes of a picture that its viewer turns are in the pixels before turning."""


@dataclass(frozen=True)
class Annotation:
    """One XML file."""

    size: tuple[int, int]
    """Width and height that it was drawn for."""
    objects: tuple[tuple[str, tuple[float, float, float, float]], ...]
    """Class (wnid) and xmin, ymin, xmax, ymax in pixels."""


@dataclass(frozen=True)
class Picture:
    """One picture of the new data set."""

    file: Path
    wnid: str
    annotation: Path | None


def parser() -> Parser:
    """The command line."""
    p = Parser(
        "pipeline.prepare_imagenet", "Turn the ILSVRC 2012 folders and XML boxes into train/, val/ and boxes.csv."
    )
    p.add_argument("root", metavar="ILSVRC", help="folder with Data/CLS-LOC and Annotations/CLS-LOC")
    p.add_argument("--out", required=True, metavar="DIR", help="folder of the data set; it is made")
    p.add_argument(
        "--split",
        choices=("validation", "train-validation"),
        default="validation",
        help="what val/ is: the official validation set, or at most 50 boxed training pictures a class (default %(default)s)",
    )
    p.add_argument("--seed", type=int, default=SEED, help="seed of the train-validation split (default %(default)s)")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Make the folder.

    Raises:
        UsageError: the folders are not as expected, an annotation cannot be read, or ``--out`` cannot be written.
    """
    arguments = parser().parse_args(argv)
    from tqdm import tqdm

    root, out = Path(arguments.root), Path(arguments.out)
    if out.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"--out {out} lies in {root}, which is only read; give a new folder beside it")
    train = list_training(root)
    if arguments.split == "train-validation":
        train, val = split_training(train, seed=arguments.seed)
    else:
        val = list_validation(root, {picture.wnid for picture in train})
    wnids = sorted({picture.wnid for picture in train})
    wanted = {("train", p.wnid, p.file.name) for p in train} | {("val", p.wnid, p.file.name) for p in val}
    for split in ("train", "val"):
        for old in (out / split).glob("*/*"):
            if (split, old.parent.name, old.name) not in wanted or not old.is_symlink():
                raise UsageError(f"--out {out} holds {old}, which is none of this split's links; give a new folder")
    pictures = [("train", picture) for picture in train] + [("val", picture) for picture in val]
    try:
        for split in ("train", "val"):
            for wnid in wnids:
                (out / split / wnid).mkdir(parents=True, exist_ok=True)
        rows: list[list[str | int | float]] = []
        turned = 0
        with ThreadPoolExecutor() as pool:
            done = pool.map(lambda pair: place(pair[0], pair[1], out), pictures)
            for found in tqdm(done, total=len(pictures), desc="prepare", unit="image"):
                turned += found is None
                rows += found or []
        write_table(out / "boxes.csv", ["path", "class", "x0", "y0", "x1", "y1", "w", "h"], rows)
        write_table(out / "class_map.csv", ["folder", "index"], [[wnid, k] for k, wnid in enumerate(wnids)])
    except OSError as error:
        raise UsageError(
            f"--out {out}: {error.strerror}: {error.filename}; give a folder that can be written"
        ) from error
    print(f"{out}: {len(train)} training and {len(val)} validation pictures of {len(wnids)} classes, {len(rows)} boxes")
    if turned:
        print(f"{turned} pictures have no box here: their viewer turns them, and the boxes were drawn before turning")


def list_training(root: Path) -> list[Picture]:
    """Training pictures, class after class, each with its annotation where there is one.

    Raises:
        UsageError: ``root`` holds no such folder, or nothing in it.
    """
    folder, boxes = root / "Data" / "CLS-LOC" / "train", root / "Annotations" / "CLS-LOC" / "train"
    pictures = [Picture(f, f.parent.name, _annotation(boxes / f.parent.name, f)) for f in _images(folder, depth=1)]
    if not pictures:
        raise UsageError(f"no pictures in {folder}/<wnid>/; give the folder that holds Data/CLS-LOC")
    return pictures


def list_validation(root: Path, known: set[str]) -> list[Picture]:
    """Validation pictures: flat, with the class in their XML, or already in folders by class.

    Raises:
        UsageError: none are there, or the class of one is not among ``known``.
    """
    folder, boxes = root / "Data" / "CLS-LOC" / "val", root / "Annotations" / "CLS-LOC" / "val"
    pictures = [Picture(f, f.parent.name, _annotation(boxes, f)) for f in _images(folder, depth=1)]
    for file in _images(folder, depth=0):
        found = _annotation(boxes, file)
        objects = read_annotation(found).objects if found else ()
        if not objects:
            raise UsageError(
                f"{file}: no object in {boxes / file.stem}.xml tells its class; unpack the validation boxes"
            )
        pictures.append(Picture(file, objects[0][0], found))
    if not pictures:
        raise UsageError(f"no pictures in {folder}; unpack the validation pictures there")
    strange = [picture for picture in pictures if picture.wnid not in known]
    if strange:
        raise UsageError(f"{strange[0].file}: class {strange[0].wnid} has no training pictures")
    return sorted(pictures, key=lambda picture: (picture.wnid, picture.file.name))


def split_training(pictures: Sequence[Picture], *, seed: int) -> tuple[list[Picture], list[Picture]]:
    """(Train-Train, Train-Validation): of each class at most 50 of the pictures that have boxes, drawn by ``seed``."""
    chosen: set[Path] = set()
    of_class: dict[str, list[Path]] = {}
    for picture in pictures:
        if picture.annotation is not None:
            of_class.setdefault(picture.wnid, []).append(picture.file)
    for wnid, boxed in sorted(of_class.items()):
        order = np.random.default_rng([seed, zlib.crc32(wnid.encode())]).permutation(len(boxed))
        chosen.update(boxed[k] for k in order[:VALIDATION_IMAGES])
    return [p for p in pictures if p.file not in chosen], [p for p in pictures if p.file in chosen]


def read_annotation(path: Path) -> Annotation:
    """Size and objects of an XML file.

    Raises:
        UsageError: it is not such a file.
    """
    try:
        top = ElementTree.parse(path).getroot()  # noqa: S314  expat expands no outside entity, and limits inner ones
        size = top.find("size")
        if size is None:
            raise ValueError("no <size>")
        width, height = (int(size.findtext(name, "")) for name in ("width", "height"))
        objects = []
        for thing in top.iter("object"):
            box = thing.find("bndbox")
            if box is None:
                raise ValueError("an <object> without <bndbox>")
            x0, y0, x1, y1 = (float(box.findtext(name, "")) for name in ("xmin", "ymin", "xmax", "ymax"))
            objects.append((thing.findtext("name", "").strip(), (x0, y0, x1, y1)))
        return Annotation((width, height), tuple(objects))
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise UsageError(f"{path} is not an annotation ({error}); unpack it anew") from error


def place(split: str, picture: Picture, out: Path) -> list[list[str | int | float]] | None:
    """Link ``picture`` into ``out``; its rows of the table, or none where its viewer turns it.

    Boxes of other classes than the picture's own are left out, as in the paper; where the XML speaks of another size
    than the file has (some hundred do), they are scaled.
    """
    path = f"{split}/{picture.wnid}/{picture.file.name}"
    link = out / path
    target = picture.file.resolve()
    if not (link.is_symlink() and link.readlink() == target):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    if picture.annotation is None:
        return []
    annotation = read_annotation(picture.annotation)
    try:
        with Image.open(picture.file) as image:
            (width, height), turned = image.size, image.getexif().get(ORIENTATION, 1) != 1
    except OSError as error:
        raise UsageError(f"{picture.file} cannot be opened ({error}); unpack it anew") from error
    if turned:
        return None
    across, down = (actual / max(said, 1) for actual, said in zip((width, height), annotation.size, strict=True))
    rows: list[list[str | int | float]] = []
    for name, (x0, y0, x1, y1) in annotation.objects:
        box = (
            min(max(x0 * across, 0.0), width),
            min(max(y0 * down, 0.0), height),
            min(max(x1 * across, 0.0), width),
            min(max(y1 * down, 0.0), height),
        )
        if name == picture.wnid and box[0] < box[2] and box[1] < box[3]:
            rows.append([path, name, *(round(value, 2) for value in box), width, height])
    return rows


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> None:
    """A CSV file, there whole or not at all."""
    partial = path.with_name(f".{path.name}")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    partial.replace(path)


def _images(folder: Path, *, depth: int) -> Iterator[Path]:
    """Pictures right in ``folder`` (depth 0) or in its folders (depth 1), sorted."""
    if not folder.is_dir():
        return
    for path in sorted(folder.glob("*" if depth == 0 else "*/*")):
        if is_image_name(path.name) and path.is_file():
            yield path


def _annotation(folder: Path, image: Path) -> Path | None:
    path = folder / f"{image.stem}.xml"
    return path if path.is_file() else None


if __name__ == "__main__":
    run(main, "pipeline.prepare_imagenet")
