"""Batches of training images: which images, in which order, cut how — all of it a function of seed, step and index."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.data.decode import ImageError
from pipeline.data.geometry import Geometry, fit
from pipeline.data.images import ROW_GROUPS, Images, row_of

ATTEMPTS = 10
"""Crops that are drawn for one that lies within the picture, as torchvision does."""
WINDOW = ROW_GROUPS - 2
"""Blocks whose images are shuffled together: fewer than are kept in memory, since batches are read ahead."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random resized crop and mirror, as in the paper; the crops are gentler because the runs are shorter."""

    smallest_area: float = 0.6
    """Least share of the picture that a crop keeps."""
    aspect: float = 4 / 3
    """Crops are at most this much wider or taller than the picture's own shape."""
    absolute: bool = False
    """`aspect` is that of the crop itself, whatever the picture's shape, as in the paper (torchvision's RandomResizedCrop)."""
    mirror: bool = True

    @property
    def views(self) -> int | None:
        """How many views of a picture there are; none where a crop may be anything."""
        whole = self.smallest_area == 1 and self.aspect == 1
        return (2 if self.mirror else 1) if whole else None


def random_view(
    image: np.ndarray, size: int, augmentation: Augmentation, random: np.random.Generator
) -> tuple[np.ndarray, bool]:
    """A random crop of ``image`` (H, W, 3) uint8, resized to (size, size, 3), and whether it is mirrored."""
    height, width = image.shape[:2]
    w, h = _crop(height, width, augmentation, random)
    x0, y0 = random.uniform(0, width - w), random.uniform(0, height - h)
    box = (x0, y0, x0 + w, y0 + h)
    view = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box))
    mirrored = augmentation.mirror and random.random() < 0.5
    return (view[:, ::-1] if mirrored else view), mirrored


def _crop(height: int, width: int, augmentation: Augmentation, random: np.random.Generator) -> tuple[float, float]:
    """Width and height in pixels of a crop of a picture of (height, width)."""
    widest = np.log(augmentation.aspect)
    for _ in range(ATTEMPTS):
        area = random.uniform(augmentation.smallest_area, 1.0)
        aspect = np.exp(random.uniform(-widest, widest)) * (height / width if augmentation.absolute else 1.0)
        w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
        if not augmentation.absolute or (w <= 1 and h <= 1):
            return min(1.0, w) * width, min(1.0, h) * height
    # None fitted: as much as there is of the allowed shapes.
    shape = min(max(width / height, np.exp(-widest)), np.exp(widest))
    return min(width, height * shape), min(height, width / shape)


def epoch_order(images: int, *, seed: int, epoch: int, blocks: np.ndarray | None = None) -> np.ndarray:
    """The order in which epoch ``epoch`` visits so many images, (images,) int64.

    ``blocks``: (images,) number of the block that each lies in, for images that have to be read a block at a time.  The
    blocks are shuffled, and then the images within every few neighbours, so that few blocks are in memory at once.
    """
    random = np.random.default_rng([seed, 0xE90C, epoch])
    if blocks is None:
        return random.permutation(images)
    place = random.permutation(int(blocks.max()) + 1)[blocks] // WINDOW  # (images,) window that each image is in
    return np.lexsort((random.random(images), place))


def step_indices(
    images: int, *, seed: int, step: int, batch_size: int, order: Callable[[int], np.ndarray] | None = None
) -> np.ndarray:
    """The images of global step ``step``, (batch_size,): the epochs laid end to end, cut every ``batch_size``.

    ``order``: epoch -> its order; by default `epoch_order` of images that can be read at random.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // images
    of = order or (lambda epoch: epoch_order(images, seed=seed, epoch=epoch))
    orders = {int(epoch): of(int(epoch)) for epoch in np.unique(epochs)}
    return np.array([orders[int(epoch)][position % images] for epoch, position in zip(epochs, positions, strict=True)])


def block_numbers(paths: Sequence[str]) -> np.ndarray | None:
    """The block that each path is read with, (n,) int64; none where every path can be read by itself."""
    if not any(row_of(path) for path in paths):
        return None
    numbers: dict[object, int] = {}

    def number(path: str) -> int:
        row = row_of(path)
        return numbers.setdefault((row.file, row.group) if row else path, len(numbers))

    return np.fromiter((number(path) for path in paths), dtype=np.int64, count=len(paths))


def block_order(paths: Sequence[str]) -> np.ndarray:
    """Indices that bring paths of one block together, (n,), and leave all else in order."""
    blocks = block_numbers(paths)
    return np.arange(len(paths)) if blocks is None else np.argsort(blocks, kind="stable")


class Loaded(NamedTuple):
    """This worker's share of a global batch."""

    step: int
    images: np.ndarray
    """(n, size, size, 3) uint8."""
    labels: np.ndarray
    """(n,) int64."""
    views: tuple[int, ...]
    """Number of each picture's view: twice its index, plus one where it is mirrored."""


class TrainingBatches:
    """Iterates over this worker's share of each global batch.

    Images are decoded ahead by a pool of threads.  An image that cannot be decoded ends the run with an `ImageError`
    that names it: a training set is looked at before it is used.
    """

    def __init__(
        self,
        *,
        root: str,
        paths: Sequence[str],
        labels: Sequence[int],
        size: int,
        geometry: Geometry,
        batch_size: int,
        seed: int,
        augmentation: Augmentation | None,
        rank: int = 0,
        world: int = 1,
        threads: int = 2,
        ahead: int = 3,
    ) -> None:
        self.images = Images(root)
        self.paths, self.labels = paths, np.asarray(labels, dtype=np.int32)
        self.blocks = block_numbers(paths)
        self.orders: dict[int, np.ndarray] = {}
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.geometry: Geometry = geometry
        self.augmentation = augmentation
        self.rank, self.world, self.threads, self.ahead = rank, world, threads, ahead

    def share(self, step: int) -> np.ndarray:
        """Indices of the images of ``step`` that this worker takes: every world-th one."""
        count, size = len(self.paths), self.batch_size
        return step_indices(count, seed=self.seed, step=step, batch_size=size, order=self._order)[
            self.rank :: self.world
        ]

    def _order(self, epoch: int) -> np.ndarray:
        """`epoch_order` of the last two epochs, which are asked for again at every step."""
        if epoch not in self.orders:
            self.orders = {known: order for known, order in self.orders.items() if known == epoch - 1}
            order = epoch_order(len(self.paths), seed=self.seed, epoch=epoch, blocks=self.blocks)
            self.orders[epoch] = order.astype(np.int32)  # of a large set two of them are kept for as long as it trains
        return self.orders[epoch]

    def load(self, step: int, index: int) -> tuple[np.ndarray, bool]:
        """Image ``index`` as step ``step`` sees it, (size, size, 3) uint8, and whether it is mirrored."""
        try:
            image = self.images.image(self.paths[index])
        except ImageError as error:
            raise ImageError(error.kind, f"{self.paths[index]}: {error.message}; mend or remove it") from error
        if self.augmentation is None:
            return fit(image, self.size, self.geometry)[0], False
        random = np.random.default_rng([self.seed, 0xA06, step, int(index)])
        return random_view(image, self.size, self.augmentation, random)

    def iterate(self, first_step: int) -> Generator[Loaded, None, None]:
        """Batches from ``first_step`` on, without end; close the iterator to stop the decoding."""
        waiting: deque[tuple[int, np.ndarray, list[Future[tuple[np.ndarray, bool]]]]] = deque()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        try:
            for step in count(first_step):
                share = self.share(step)
                waiting.append((step, share, [pool.submit(self.load, step, int(index)) for index in share]))
                if len(waiting) > self.ahead:
                    ready, share, images = waiting.popleft()
                    loaded = [image.result() for image in images]
                    views = tuple(2 * int(k) + mirrored for k, (_, mirrored) in zip(share, loaded, strict=True))
                    yield Loaded(
                        ready, np.stack([image for image, _ in loaded]), self.labels[share].astype(np.int64), views
                    )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
