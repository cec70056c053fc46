"""The course of a training, a line for each step, as ``log.csv`` has it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

COLUMNS: tuple[str, ...] = (
    "step", "phase", "course", "seconds", "clean_loss", "clean_right", "masker_loss", "in_right", "out_right",
    "mask_mean", "hidden", "leak", "unit", "price", "waiting",
)  # fmt: skip


class StepLog:
    """Finished lines: the steps of a long run take a quarter of the memory that their figures would."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, row: Mapping[str, object]) -> None:
        """Add the figures of a step; a method with one side only has no figures of the other."""
        text = io.StringIO()
        csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n").writerow(row)
        self._lines.append(text.getvalue())

    def write(self, path: Path) -> None:
        """Write a header and all lines."""
        with path.open("w", encoding="utf-8", newline="") as file:
            file.write(",".join(COLUMNS) + "\n")
            file.writelines(self._lines)

    def read(self, path: Path) -> None:
        """Go on from what `write` wrote."""
        with path.open(encoding="utf-8", newline="") as file:
            self._lines = file.readlines()[1:]
