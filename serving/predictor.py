"""One engine in one replica: decode in threads, infer in one thread, and the rows of `serving.rows`."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from export.engine import Engine, open_engine
from pipeline.data.decode import decode_image
from pipeline.data.geometry import fit
from serving.decoder import single_threaded
from serving.metrics import Metrics
from serving.rows import Seen, scored_row, top_classes

OVERLAY_PIXELS = 4_000_000
"""An overlay is drawn on a copy of the picture that is no larger."""
STUCK_SECONDS = 60.0
"""A thread that is busy with one image or one batch for longer is not healthy."""
FAILURES = 3
"""An engine that has failed so many batches in a row is not healthy."""


_TRACING = threading.Lock()
"""Held while a bundle is loaded and while one infers: torch traces the one by changing how all modules are called."""


@dataclass(frozen=True)
class Picture:
    """A decoded image, and a copy to draw on where one was asked for."""

    seen: Seen
    copy: np.ndarray | None = None
    """(H, W, 3) uint8 RGB, upright, at most `OVERLAY_PIXELS`."""


class Predictor:
    """An engine and the threads around it.  Only `infer` touches the engine, one batch at a time."""

    def __init__(
        self, engine: str, *, provider: str, threads: int, max_pixels: int, metrics: Metrics, watched: bool = True
    ) -> None:
        """``watched``: its masks are those that the reference for drift is of."""
        with _TRACING if Path(engine).is_dir() else nullcontext():
            self.engine: Engine = open_engine(engine, provider=provider, threads=threads)  # type: ignore[arg-type]
        self.info = self.engine.info
        self.metrics = metrics
        self._watched = watched
        self._max_pixels = max_pixels
        self._decoding = ThreadPoolExecutor(threads, thread_name_prefix="decode", initializer=single_threaded)
        self._inferring = ThreadPoolExecutor(1, thread_name_prefix="infer")
        self._under_way: dict[object, tuple[str, float]] = {}  # what threads do, and since when
        self._failed_in_a_row = 0

    def warm_up(self, batch_size: int) -> None:
        """Run a batch of so many once, so that the first request with one finds everything in place."""
        side = self.info.input_size
        self._inferring.submit(self._run, np.zeros((batch_size, side, side, 3), dtype=np.uint8)).result()

    @property
    def trouble(self) -> str | None:
        """Why this engine cannot be relied on, in a line; None when it can."""
        now = time.monotonic()
        for stage, since in list(self._under_way.values()):
            if now - since > STUCK_SECONDS:
                return f"one {stage} has taken longer than {STUCK_SECONDS:.0f} s"
        if self._failed_in_a_row >= FAILURES:
            return f"the last {self._failed_in_a_row} batches failed"
        return None

    async def decode(self, data: bytes, *, keep: bool) -> Picture:
        """Decode and fit off the event loop; ``keep`` a copy to draw on.  Raises `ImageError`."""
        return await self._timed("decode", self._decoding, self._decode, data, keep)

    async def infer(self, batch: list[Picture]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(logits (C,), mask (h, w)) of each picture of a batch."""
        self.metrics.batch_sizes.observe(len(batch))
        pixels = np.stack([picture.seen.pixels for picture in batch])
        logits, masks = await self._timed("infer", self._inferring, self._run, pixels)
        return list(zip(logits, masks, strict=True))

    async def finish(
        self, picture: Picture, logits: np.ndarray, mask: np.ndarray, *, uri: str, top_k: int
    ) -> dict[str, Any]:
        """The row of a picture with its best classes as ``topk``."""
        return await self._timed("finish", self._decoding, self._finish, picture.seen, logits, mask, uri, top_k)

    async def run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Any other work that must not hold the event loop up."""
        return await asyncio.get_running_loop().run_in_executor(self._decoding, call, *arguments)

    def close(self) -> None:
        """Let the threads end when they have done what they were given."""
        self._decoding.shutdown(wait=False)
        self._inferring.shutdown(wait=False)

    async def _timed(self, stage: str, pool: ThreadPoolExecutor, call: Callable[..., Any], *arguments: Any) -> Any:
        def timed() -> Any:
            this, begun = object(), time.monotonic()
            self._under_way[this] = stage, begun
            try:
                return call(*arguments)
            finally:
                del self._under_way[this]
                self.metrics.stage_seconds.labels(stage).observe(time.monotonic() - begun)

        return await asyncio.get_running_loop().run_in_executor(pool, timed)

    def _decode(self, data: bytes, keep: bool) -> Picture:
        image = decode_image(data, max_pixels=self._max_pixels)
        height, width = image.shape[:2]
        pixels, view = fit(image, self.info.input_size, self.info.geometry)
        return Picture(Seen(pixels=pixels, view=view, width=width, height=height), _reduced(image) if keep else None)

    def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            with _TRACING if self.info.kind == "torch" else nullcontext():
                found = self.engine.infer(pixels)
        except BaseException:
            self._failed_in_a_row += 1
            raise
        self._failed_in_a_row = 0
        return found

    def _finish(self, seen: Seen, logits: np.ndarray, mask: np.ndarray, uri: str, top_k: int) -> dict[str, Any]:
        if self._watched:
            self.metrics.watch_mask(mask)
        row = scored_row(uri, seen, logits, mask, class_names=self.info.class_names, engine=self.info.sha256)
        return row | {"topk": top_classes(logits, top_k, class_names=self.info.class_names)}


def _reduced(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    scale = (OVERLAY_PIXELS / (height * width)) ** 0.5
    if scale >= 1:
        return image
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
