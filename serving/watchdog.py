"""The end of a process whose decoder never returns: nothing else ends a thread that is inside of it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 120.0
"""Time for one picture; the largest that are allowed take some seconds."""


class Watchdog:
    """Kills this process when a picture takes longer than `SECONDS`.

    Its shard then goes to another worker, as after any death, and to a process of the decoder's own once it has cost two
    (`serving.attempts`, `serving.careful`): there the picture becomes an error row.
    """

    def __init__(self) -> None:
        self._begun: dict[int, float] = {}  # thread -> when its picture was begun
        self._stop = threading.Event()

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    @contextmanager
    def picture(self) -> Iterator[None]:
        """While one picture is decoded."""
        thread = threading.get_ident()
        self._begun[thread] = time.monotonic()
        try:
            yield
        finally:
            del self._begun[thread]

    def _watch(self) -> None:
        while not self._stop.wait(SECONDS / 10):
            if any(time.monotonic() - begun > SECONDS for begun in list(self._begun.values())):
                print(f"a picture was not decoded in {SECONDS:.0f} s; this worker ends", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
