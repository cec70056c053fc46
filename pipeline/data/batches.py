"""Batches of training images: which images, in which order, cut how — all of it a function of seed, step and index."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.decode import ImageError, read_image
from pipeline.data.geometry import Geometry, fit


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random resized crop and mirror, as in the paper; the crops are gentler because the runs are shorter."""

    smallest_area: float = 0.6
    """Least share of the picture that a crop keeps."""
    aspect: float = 4 / 3
    """Crops are at most this much wider or taller than the picture's own shape."""
    mirror: bool = True


def random_view(image: np.ndarray, size: int, augmentation: Augmentation, random: np.random.Generator) -> np.ndarray:
    """A random crop of ``image`` (H, W, 3) uint8, resized to (size, size, 3), perhaps mirrored."""
    height, width = image.shape[:2]
    area = random.uniform(augmentation.smallest_area, 1.0)
    aspect = np.exp(random.uniform(-np.log(augmentation.aspect), np.log(augmentation.aspect)))
    w = min(1.0, np.sqrt(area * aspect)) * width
    h = min(1.0, np.sqrt(area / aspect)) * height
    x0, y0 = random.uniform(0, width - w), random.uniform(0, height - h)
    box = (x0, y0, x0 + w, y0 + h)
    view = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box))
    return view[:, ::-1] if augmentation.mirror and random.random() < 0.5 else view


def epoch_order(images: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order in which epoch ``epoch`` visits so many images, (images,) int64."""
    return np.random.default_rng([seed, 0xE90C, epoch]).permutation(images)


def step_indices(images: int, *, seed: int, step: int, batch_size: int) -> np.ndarray:
    """The images of global step ``step``, (batch_size,): the epochs laid end to end, cut every ``batch_size``."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // images
    orders = {int(epoch): epoch_order(images, seed=seed, epoch=int(epoch)) for epoch in np.unique(epochs)}
    return np.array([orders[int(epoch)][position % images] for epoch, position in zip(epochs, positions, strict=True)])


class TrainingBatches:
    """Iterates over (step, images (n, size, size, 3) uint8, labels (n,)), this worker's share of each global batch.

    Images are decoded ahead by a pool of threads.  An image that cannot be decoded ends the run with an `ImageError`
    that names it: a training set is looked at before it is used.
    """

    def __init__(
        self,
        *,
        root: Path,
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
        self.root, self.paths, self.labels = root, paths, np.asarray(labels, dtype=np.int64)
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.geometry: Geometry = geometry
        self.augmentation = augmentation
        self.rank, self.world, self.threads, self.ahead = rank, world, threads, ahead

    def share(self, step: int) -> np.ndarray:
        """Indices of the images of ``step`` that this worker takes: every world-th one."""
        return step_indices(len(self.paths), seed=self.seed, step=step, batch_size=self.batch_size)[
            self.rank :: self.world
        ]

    def load(self, step: int, index: int) -> np.ndarray:
        """Image ``index`` as step ``step`` sees it, (size, size, 3) uint8."""
        try:
            image = read_image(self.root / self.paths[index])
        except ImageError as error:
            raise ImageError(error.kind, f"{self.paths[index]}: {error.message}; mend or remove it") from error
        if self.augmentation is None:
            return fit(image, self.size, self.geometry)[0]
        random = np.random.default_rng([self.seed, 0xA06, step, int(index)])
        return random_view(image, self.size, self.augmentation, random)

    def iterate(self, first_step: int) -> Generator[tuple[int, np.ndarray, np.ndarray], None, None]:
        """Batches from ``first_step`` on, without end; close the iterator to stop the decoding."""
        waiting: deque[tuple[int, np.ndarray, list[Future[np.ndarray]]]] = deque()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        try:
            for step in count(first_step):
                share = self.share(step)
                waiting.append((step, share, [pool.submit(self.load, step, int(index)) for index in share]))
                if len(waiting) > self.ahead:
                    ready, share, images = waiting.popleft()
                    yield ready, np.stack([image.result() for image in images]), self.labels[share]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
