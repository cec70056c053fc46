"""What the training loop tells the outside, and the plainest outside there is: a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Reporter(Protocol):
    """What the loop tells the outside."""

    run: str | None
    """The run's folder or URI, where what many checkpoints share is written once; none: each checkpoint holds all of it."""

    def progress(self, row: dict[str, Any]) -> None:
        """Called on every worker after each step."""
        ...

    def leaving(self) -> bool:
        """Whether a machine of this run is about to be taken away; called by all workers at the same steps."""
        ...

    def ready(self) -> bool:
        """Whether another validation may be asked for; rank 0's answer counts."""
        ...

    def checkpoint(
        self, write: Callable[[Path], None], row: dict[str, Any], *, final: bool, validate: bool = False
    ) -> None:
        """Called on every worker; rank 0 is to call ``write`` with an empty folder to fill.

        ``validate``: the folder will hold a `bundle`, which is to be judged while the training goes on.
        """
        ...


class FolderReporter:
    """Keeps the newest checkpoint in a folder, whole or not at all, and tells how far the run is."""

    run: str | None = None

    def __init__(self, folder: Path, tell: Callable[[dict[str, Any]], None] = lambda row: None) -> None:
        self.folder, self.tell = folder, tell

    def progress(self, row: dict[str, Any]) -> None:
        """Pass it on."""
        self.tell(row)

    def leaving(self) -> bool:
        """Never: this machine is not taken away."""
        return False

    def ready(self) -> bool:
        """Never: nothing is validated on the way."""
        return False

    def checkpoint(
        self, write: Callable[[Path], None], row: dict[str, Any], *, final: bool, validate: bool = False
    ) -> None:
        """Write beside the older checkpoint and take its place."""
        partial, old = self.folder.with_suffix(".partial"), self.folder.with_suffix(".old")
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        if self.folder.exists():
            self.folder.rename(old)
        partial.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)
