"""How long a run will still take, by its pace since this process's first step: neither what came before a restart nor the
start-up counts."""

from __future__ import annotations

import time
from collections.abc import Callable

KNOWN_FROM = 0.005
"""Share of a run that has to be done before its pace says something."""


class TimeLeft:
    """Asked after each step with the share of the run that is done; the clock starts with the first question."""

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._begun: tuple[float, float] | None = None  # when, and the share that was done by then

    def seconds(self, done: float) -> float | None:
        """Until the end, when the share ``done`` of the run, in [0, 1], is done; none while there is no pace."""
        if self._begun is None:
            self._begun = (self._now(), done)
        begun, first = self._begun
        since = done - first
        return None if since < KNOWN_FROM else (self._now() - begun) / since * max(1 - done, 0.0)

    def words(self, done: float) -> str:
        """Such as `1:05 h left`, `12 min left`, `40 s left`; nothing while there is no pace."""
        left = self.seconds(done)
        if left is None:
            return ""
        if left < 90:
            return f"{left:.0f} s left"
        minutes = round(left / 60)
        return f"{minutes} min left" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h left"
