"""The time that is left is that of this process's pace."""

from __future__ import annotations

import pytest

from pipeline.time_left import TimeLeft


def test_what_came_before_the_first_step_does_not_count() -> None:
    clock = iter([100.0, 160.0])
    left = TimeLeft(now=lambda: next(clock))
    assert left.seconds(0.5) is None  # the first step after a restart
    assert left.seconds(0.6) == pytest.approx(240)  # a tenth took a minute, four are left


def test_there_is_no_pace_at_the_start() -> None:
    left = TimeLeft()
    assert left.seconds(0.25) is None and left.words(0.252) == ""


@pytest.mark.parametrize(
    ("elapsed", "words"), [(30, "30 s left"), (720, "12 min left"), (3900, "1:05 h left"), (0, "0 s left")]
)
def test_words(elapsed: float, words: str) -> None:
    clock = iter([0.0, elapsed])
    left = TimeLeft(now=lambda: next(clock))
    assert left.words(0.0) == ""
    assert left.words(0.5) == words
