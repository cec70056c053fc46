"""The images that exports are calibrated on and judged by: a folder of the user's, the bundle's samples, or noise."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from pipeline.data.annotations import Annotations
from pipeline.data.decode import ImageError
from pipeline.data.geometry import box_to_input, fit
from pipeline.data.images import Images
from pipeline.data.listing import SPLITS, list_images
from pipeline.data.splits import read_split
from pipeline.errors import UsageError

NOISE_IMAGES = 64


@dataclass(frozen=True, kw_only=True)
class GateImages:
    """Images fitted to the network's input, with what is known of them."""

    source: str
    """Where they come from, for reports."""
    images: np.ndarray
    """(n, S, S, 3) uint8."""
    names: list[str]
    targets: np.ndarray | None
    """(n,) index of the logit of the true class; None when classes are not known."""
    boxes: list[np.ndarray | None]
    """(k, 4) float64 each, in input pixels; None without annotation."""

    @property
    def sha256(self) -> str:
        """Of the pixels, in order."""
        return hashlib.sha256(np.ascontiguousarray(self.images).data).hexdigest()

    def first(self, count: int) -> GateImages:
        """The first ``count`` of them."""
        return self.chosen(range(min(count, len(self.images))))

    def chosen(self, places: Sequence[int]) -> GateImages:
        """Those at ``places``."""
        return replace(
            self,
            images=self.images[list(places)],
            names=[self.names[k] for k in places],
            targets=None if self.targets is None else self.targets[list(places)],
            boxes=[self.boxes[k] for k in places],
        )

    @property
    def annotated(self) -> int:
        """How many images have a box."""
        return sum(boxes is not None for boxes in self.boxes)


def _bare(source: str, images: np.ndarray) -> GateImages:
    count = len(images)
    return GateImages(
        source=source, images=images, names=[f"#{k}" for k in range(count)], targets=None, boxes=[None] * count
    )


def from_samples(samples: np.ndarray, count: int) -> GateImages:
    """The first ``count`` of a bundle's samples (n, S, S, 3) uint8."""
    return _bare("the bundle's samples", samples[:count])


def from_noise(size: int, count: int, *, seed: int = 0) -> GateImages:
    """Coloured noise, coarse and fine: enough to compare tensors, too little to judge explanations."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 8, 8, 3))
    cell = -(-size // 8)
    images = coarse.repeat(cell, axis=1).repeat(cell, axis=2)[:, :size, :size]
    images = np.clip(images + generator.integers(-40, 41, images.shape), 0, 255).astype(np.uint8)
    return _bare("generated noise (no folder of images was given, and no bundle with samples)", images)


def apart_from(images: GateImages, others: GateImages) -> GateImages:
    """Those of ``images`` whose pixels are not among ``others``."""
    seen = {image.tobytes() for image in others.images}
    return images.chosen([k for k, image in enumerate(images.images) if image.tobytes() not in seen])


def from_folder(
    root: str | Path,
    *,
    size: int,
    geometry: Literal["squash", "crop"],
    count: int,
    data_classes: Sequence[str] = (),
    class_index: Sequence[int] = (),
    splits: Sequence[str] = ("val", "test", "train"),
    flag: str = "--data",
) -> GateImages:
    """At most ``count`` images of a folder, spread evenly over it: of its first split among ``splits``, or all.

    Classes are used when the folder has splits and they are the model's; boxes when it has ``boxes.csv``.  Unreadable
    images are named on stderr and left out.

    Raises:
        UsageError: there is no image that can be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"{flag} {root}: no such folder; give a folder of images")
    paths, labels = _listing(root, splits, data_classes)
    annotations = Annotations.of(root)
    keep = np.unique(np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int)) if paths else []
    files = Images(str(root))
    names: list[str] = []
    images: list[np.ndarray] = []
    targets: list[int] = []
    boxes: list[np.ndarray | None] = []
    for index in keep:
        path = paths[index]
        try:
            picture = files.image(path)
        except ImageError as error:
            print(f"left out {root / path}: {error}", file=sys.stderr)
            continue
        fitted, view = fit(picture, size, geometry)
        known = annotations.boxes(path, (picture.shape[1], picture.shape[0]))
        names.append(path)
        images.append(fitted)
        targets.append(class_index[labels[index]] if labels else -1)
        boxes.append(np.array([box_to_input(box, view, size) for box in known]) if len(known) else None)
    if not images:
        raise UsageError(f"{flag} {root}: no readable image there; give a folder of images")
    return GateImages(
        source=str(root),
        images=np.stack(images),
        names=names,
        targets=np.array(targets) if labels else None,
        boxes=boxes,
    )


def _listing(root: Path, splits: Sequence[str], data_classes: Sequence[str]) -> tuple[list[str], list[int]]:
    """Paths relative to ``root``, and labels where the folder is a data set of the model's classes."""
    for name in splits:
        if (root / name).is_dir():
            try:
                split = read_split(root, name, classes=list(data_classes))
            except UsageError:  # other classes, or none: still images to compare engines on
                return [f"{name}/{path}" for path in list_images(root / name).paths], []
            return split.paths, split.labels
    if any((root / name).is_dir() for name in SPLITS):
        raise UsageError(f"{root} has none of the folders {', '.join(splits)}; name another folder")
    return list_images(root).paths, []


class Described(Protocol):
    """What has to be known of a model to prepare images for it: a `ModelSpec` or a `Manifest`."""

    @property
    def input_size(self) -> int: ...
    @property
    def geometry(self) -> Literal["squash", "crop"]: ...
    @property
    def data_classes(self) -> list[str]: ...
    @property
    def class_index(self) -> list[int]: ...


def gate_images(
    about: Described,
    samples: np.ndarray | None,
    data: str | None,
    count: int,
    *,
    flag: str = "--data",
    splits: Sequence[str] = ("val", "test", "train"),
) -> GateImages:
    """The images of the folder ``data``, else ``samples`` (n, S, S, 3) uint8, else noise."""
    if data is not None:
        return from_folder(
            data,
            size=about.input_size,
            geometry=about.geometry,
            count=count,
            data_classes=about.data_classes,
            class_index=about.class_index,
            splits=splits,
            flag=flag,
        )
    if samples is not None and len(samples):
        return from_samples(samples, count)
    return from_noise(about.input_size, min(count, NOISE_IMAGES))
