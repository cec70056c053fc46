"""Batches that form while the engine is busy: whenever it is free, it gets all that has come meanwhile, up to the limit.

Ray Serve's own ``serve.batch`` closes a batch when its wait is over, also while the engine is still at work on the one before:
pictures that come one after the other, as decoding lets them, then queue up as batches of one.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


class Gathering(Generic[_T, _R]):
    """Calls ``together`` with a list of items, one call at a time; each caller gets the result of its own item."""

    def __init__(self, together: Callable[[list[_T]], Awaitable[Sequence[_R]]]) -> None:
        self.batch_size = 1
        """Items in one call, at most."""
        self.wait_s = 0.0
        """How long the first item waits for others when nothing is under way."""
        self._together = together
        self._waiting: deque[tuple[_T, asyncio.Future[_R], float]] = deque()
        self._come = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, item: _T) -> _R:
        """The result of an item, in whatever batch it gets into."""
        future: asyncio.Future[_R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future, time.monotonic()))
        self._come.set()
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        """Take batches until nobody waits."""
        while self._waiting:
            await self._gather()
            batch: list[tuple[_T, asyncio.Future[_R]]] = []
            while self._waiting and len(batch) < self.batch_size:
                item, future, _ = self._waiting.popleft()
                if not future.done():  # whoever has left needs no result
                    batch.append((item, future))
            if batch:
                await self._call(batch)
        self._worker = None

    async def _gather(self) -> None:
        """Wait until a batch is full, or its first item has waited long enough."""
        end = self._waiting[0][2] + self.wait_s
        while len(self._waiting) < self.batch_size and (left := end - time.monotonic()) > 0:
            self._come.clear()
            try:
                await asyncio.wait_for(self._come.wait(), left)
            except TimeoutError:
                return

    async def _call(self, batch: list[tuple[_T, asyncio.Future[_R]]]) -> None:
        try:
            results = await self._together([item for item, _ in batch])
            pairs = list(zip(batch, results, strict=True))
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in pairs:
            if not future.done():
                future.set_result(result)
