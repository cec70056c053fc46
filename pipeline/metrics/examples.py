"""The labelled images of a data set as an evaluation sees them: fitted to the input, with the truth in input pixels."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.annotations import Annotations
from pipeline.data.batches import block_order
from pipeline.data.decode import ImageError
from pipeline.data.geometry import View, box_to_input, fit
from pipeline.data.images import Images
from pipeline.data.splits import read_split
from pipeline.errors import UsageError
from pipeline.metrics.boxes import Compat
from pipeline.metrics.localisation import clip_boxes, published_input_boxes
from pipeline.spec import ModelSpec

_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image."""

    path: str
    """Relative to the root of the data set."""
    label: int
    """Its class, an index into the model's ``data_classes``."""
    image: np.ndarray
    """(S, S, 3) uint8."""
    boxes: np.ndarray | None
    """(k, 4) true boxes in pixels of the input, perhaps beyond it; None when none is known."""
    mask: np.ndarray | None
    """(S, S) uint8 of 1 foreground, 0 background, 255 ignored; None when none is known."""

    def where(self) -> np.ndarray | None:
        """Where the object is, (S, S) bool: its mask, else its boxes; None when neither is known."""
        if self.mask is not None:
            return self.mask == 1
        if self.boxes is None:
            return None
        inside = np.zeros(self.image.shape[:2], dtype=bool)
        for x0, y0, x1, y1 in np.rint(clip_boxes(self.boxes, len(inside))).astype(int):
            inside[y0:y1, x0:x1] = True
        return inside


class Examples:
    """The images of one split, read when they are asked for."""

    def __init__(
        self,
        root: str | Path,
        spec: ModelSpec,
        *,
        split: str = "val",
        boxes: str | Path | None = None,
        masks: str | Path | None = None,
        limit: int | None = None,
        seed: int = 0,
        compat: Compat = None,
    ) -> None:
        """``limit``: take only so many images, drawn by ``seed``.

        Raises:
            UsageError: no such split, a class that the model does not know, or a table of boxes for other images.
        """
        listed = read_split(root, split, classes=spec.data_classes)
        self.spec = spec
        self.compat: Compat = compat
        self.annotations = Annotations.of(root, boxes=boxes, masks=masks)
        table = self.annotations.box_table
        if table and not any(path in table for path in listed.paths):
            named = boxes or Path(root) / "boxes.csv"
            raise UsageError(
                f"{named} has no box for any image of {Path(root) / split}; its paths look like {next(iter(table))!r} "
                f"and should look like {listed.paths[0]!r}"
            )
        chosen = np.arange(len(listed.paths))
        if limit is not None and limit < len(chosen):
            chosen = np.sort(np.random.default_rng(seed).choice(chosen, limit, replace=False))
        chosen = chosen[block_order([listed.paths[index] for index in chosen])]
        self.images = Images(listed.root)
        self.paths = [listed.paths[index] for index in chosen]
        self.labels = np.array([listed.labels[index] for index in chosen])

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Example:
        """Read image number ``index``.

        Raises:
            ImageError: the file is no picture.
            UsageError: its annotation does not fit it.
        """
        path = self.paths[index]
        picture = self.images.image(path)
        height, width = picture.shape[:2]
        image, view = fit(picture, self.spec.input_size, self.spec.geometry)
        mask = self.annotations.mask(path, (width, height))
        return Example(
            path=path,
            label=int(self.labels[index]),
            image=image,
            boxes=self._input_boxes(self.annotations.boxes(path, (width, height)), view, width, height),
            mask=None if mask is None else mask_to_input(mask, view, self.spec.input_size),
        )

    def _input_boxes(self, boxes: np.ndarray, view: View, width: int, height: int) -> np.ndarray | None:
        if not len(boxes):
            return None
        size = self.spec.input_size
        if self.compat == "published":
            return published_input_boxes(boxes, width, height, size, squash=self.spec.geometry == "squash")
        return np.array([box_to_input(box, view, size) for box in boxes])

    def batches(
        self, batch_size: int, *, indices: Sequence[int] | None = None, threads: int = 2
    ) -> Iterator[list[Example | ImageError]]:
        """All images, or those of ``indices``, in order; an image that cannot be decoded is its error instead.

        A pool of threads reads ahead by two batches, so memory does not depend on the number of images.
        """
        waiting: deque[list[Future[Example | ImageError]]] = deque()
        with ThreadPoolExecutor(threads, thread_name_prefix="examples") as pool:
            wanted = range(len(self)) if indices is None else indices
            for start in range(0, len(wanted), batch_size):
                group = wanted[start : start + batch_size]
                waiting.append([pool.submit(self._load_or_error, index) for index in group])
                if len(waiting) > _AHEAD:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]

    def _load_or_error(self, index: int) -> Example | ImageError:
        try:
            return self.load(index)
        except ImageError as error:
            return error


def mask_to_input(mask: np.ndarray, view: View, size: int) -> np.ndarray:
    """A true mask (H, W) of the upright picture as (size, size): each input pixel takes the value under its centre."""
    centres = (np.arange(size) + 0.5) / size
    rows = np.floor(view.y0 + centres * (view.y1 - view.y0)).astype(int).clip(0, mask.shape[0] - 1)
    columns = np.floor(view.x0 + centres * (view.x1 - view.x0)).astype(int).clip(0, mask.shape[1] - 1)
    return mask[rows[:, None], columns]
