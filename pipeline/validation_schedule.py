"""When a training asks for its next validation: by the clock, or by passes over the data."""

from __future__ import annotations


class ValidationSchedule:
    """Tells after each step whether a validation is due.  All workers ask it with the same figures."""

    def __init__(self, *, seconds: float | None, steps: int | None, step: int, spent: float) -> None:
        """``seconds`` or ``steps``: between two validations; neither: never.  ``step``, ``spent``: where the run goes on."""
        self.seconds, self.steps = seconds, steps
        self._next_seconds = None if seconds is None else spent + seconds
        self._next_step = None if steps is None else (step // steps + 1) * steps

    def due(self, step: int, seconds: float) -> bool:
        """``step``: how many steps are done; ``seconds``: how long the run has taken."""
        by_clock = self._next_seconds is not None and seconds >= self._next_seconds
        return by_clock or (self._next_step is not None and step >= self._next_step)

    def asked(self, step: int, seconds: float) -> None:
        """A validation has been asked for."""
        if self.seconds is not None:
            self._next_seconds = seconds + self.seconds
        if self.steps is not None:
            self._next_step = (step // self.steps + 1) * self.steps

    def later(self, step: int, seconds: float) -> None:
        """The one before is still going on: look again after a quarter of the time."""
        if self.seconds is not None:
            self._next_seconds = seconds + self.seconds / 4
        if self.steps is not None:
            self._next_step = step + max(1, self.steps // 4)
