"""Read, decode and fit the images of a shard, in threads, in order: in the worker that scores them or on another machine."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Semaphore
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.data import store
from pipeline.data.decode import ImageError, decode_draft, decode_image
from pipeline.data.geometry import View, fit
from serving.careful import CarefulDecoder
from serving.plan import Shard
from serving.rows import Seen
from serving.sources import Source, printable, sources
from serving.watchdog import Watchdog

STORE_FAILURES = 4
"""So many unanswered reads in one shard are the store's fault, and no reason to write rows of errors."""
READERS_REMOTE = 16
"""Reads under way at a time when the images lie behind a network."""

_T = TypeVar("_T")
_R = TypeVar("_R")


class Decoded(NamedTuple):
    """One input of a shard."""

    number: int
    """Its place in the shard."""
    uri: str
    seen: Seen | str
    """The image, or why there is none; the text begins with the kind of error."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What decoding needs to know."""

    size: int
    """Side of the square that the engine takes, in pixels."""
    geometry: Literal["squash", "crop"]
    threads: int = 1
    ahead: int = 32
    """Decoded images that may wait to be taken."""
    max_pixels: int = 100_000_000
    draft: bool = False
    """Let libjpeg scale large JPEGs down while it decodes them."""
    column: str | None = None
    roots: tuple[str, ...] = ()
    """Images outside these places are not read; empty: no limit."""


class Decoder:
    """Decodes the images of one shard after the other."""

    def __init__(self, config: DecoderConfig) -> None:
        self.config = config
        self._decoding = Semaphore(config.threads)
        self._store_failures = 0

    def shard(
        self, shard: Shard, *, wanted: Callable[[int], bool] = lambda _number: True, careful: bool = False
    ) -> Iterator[Decoded]:
        """The inputs of a shard for whose numbers ``wanted`` is true, in order.

        ``careful``: decode in another process, since some picture of this shard may kill the one that decodes it.

        Raises:
            StoreError: the store does not answer.
        """
        found = enumerate(sources(shard, column=self.config.column, roots=self.config.roots))
        remote = store.is_remote(shard.source or (shard.uris[0] if shard.uris else ""))
        return self.decode(((n, source) for n, source in found if wanted(n)), remote=remote, careful=careful)

    def decode(
        self, found: Iterable[tuple[int, Source]], *, remote: bool = False, careful: bool = False
    ) -> Iterator[Decoded]:
        """Decode numbered sources in order, some ahead of whoever takes them."""
        config = self.config
        elsewhere, watchdog = CarefulDecoder(config), Watchdog()

        def see(data: bytes) -> Seen:
            if careful:  # it has a clock of its own
                return elsewhere.see(data)
            with watchdog.picture():
                return self.see(data)

        threads = max(READERS_REMOTE, self.config.threads) if remote else self.config.threads
        self._store_failures = 0
        with watchdog, ThreadPoolExecutor(threads, initializer=single_threaded) as pool:
            yield from _ahead(pool, lambda one: self._one(one, see), found, config.ahead + threads)
        elsewhere.close()

    def _one(self, found: tuple[int, Source], see: Callable[[bytes], Seen]) -> Decoded:
        number, source = found
        uri = printable(source.uri)
        try:
            data = source.read()
            with self._decoding:  # many may read at once, but pictures in memory are counted
                return Decoded(number, uri, see(data))
        except ImageError as error:
            return Decoded(number, uri, str(error))
        except store.StoreError as error:
            self._store_failures += 1
            if self._store_failures >= STORE_FAILURES:
                raise
            return Decoded(number, uri, f"unreadable: {error}")

    def see(self, data: bytes) -> Seen:
        """Encoded image to what the engine is given.  Raises `ImageError`."""
        config = self.config
        if config.draft:
            image, (width, height) = decode_draft(data, config.size, max_pixels=config.max_pixels)
        else:
            image = decode_image(data, max_pixels=config.max_pixels)
            height, width = image.shape[:2]
        pixels, view = fit(image, config.size, config.geometry)
        if image.shape[:2] != (height, width):
            across, down = width / image.shape[1], height / image.shape[0]
            view = View(view.x0 * across, view.y0 * down, view.x1 * across, view.y1 * down)
        return Seen(pixels=pixels, view=view, width=width, height=height)


def single_threaded() -> None:
    """Threads that decode resize for themselves; torch's own on top of them would only get in each other's way."""
    import torch

    torch.set_num_threads(1)


def pack(images: Iterable[Decoded]) -> bytes:
    """Decoded images as one message for another process."""
    rows: list[dict[str, Any]] = []
    for number, uri, seen in images:
        row: dict[str, Any] = {"number": number, "uri": uri}
        if isinstance(seen, str):
            row["error"] = seen
        else:
            pixels = np.ascontiguousarray(seen.pixels).tobytes()
            row |= {"pixels": pixels, "view": list(seen.view), "width": seen.width, "height": seen.height}
        rows.append(row)
    table = pa.Table.from_pylist(rows, schema=_MESSAGE)
    target = io.BytesIO()
    with pa.ipc.new_stream(target, table.schema) as writer:
        writer.write_table(table)
    return target.getvalue()


def unpack(message: bytes, *, size: int) -> Iterator[Decoded]:
    """The images of `pack`; pixels are views of the message."""
    for batch in pa.ipc.open_stream(message):
        for k in range(batch.num_rows):
            row = {name: batch.column(name)[k] for name in _MESSAGE.names}
            number, uri = row["number"].as_py(), row["uri"].as_py()
            if row["pixels"].is_valid:
                pixels = np.frombuffer(row["pixels"].as_buffer(), dtype=np.uint8).reshape(size, size, 3)
                view = tuple(row["view"].as_py())
                yield Decoded(
                    number,
                    uri,
                    Seen(pixels=pixels, view=view, width=row["width"].as_py(), height=row["height"].as_py()),
                )
            else:
                yield Decoded(number, uri, row["error"].as_py())


_MESSAGE = pa.schema(
    [
        ("number", pa.int64()),
        ("uri", pa.string()),
        ("error", pa.string()),
        ("pixels", pa.large_binary()),
        ("view", pa.list_(pa.float64())),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)


def _ahead(pool: ThreadPoolExecutor, call: Callable[[_T], _R], items: Iterable[_T], depth: int) -> Iterator[_R]:
    """``map(call, items)`` in order, with at most ``depth`` calls under way or waiting to be taken."""
    under_way: deque[Future[_R]] = deque()
    for item in items:
        under_way.append(pool.submit(call, item))
        if len(under_way) >= depth:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()
