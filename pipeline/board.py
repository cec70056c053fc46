"""TensorBoard's event files of a run, on this machine or in an object store."""

from __future__ import annotations

import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.data import store
from pipeline.errors import UsageError, WorkError

BETWEEN = 600.0
"""Seconds between two writings of the same events to a store."""


class Board:
    """Writes scalars to ``RUN/tensorboard/<name>``; objects of a store are written whole at each `flush`."""

    def __init__(self, run: str, name: str, *, first_step: int | None = None) -> None:
        """``first_step``: where a run goes on; what an earlier process wrote beyond it is hidden.  None hides nothing."""
        from tensorboardX import SummaryWriter

        place = store.join(store.place_of(run), "tensorboard", name)
        self.remote = place if store.is_remote(place) else None
        self.folder = Path(tempfile.mkdtemp()) if self.remote else Path(place)
        self.sent = time.monotonic()
        self.writer = SummaryWriter(
            str(self.folder),
            purge_step=None if first_step is None else first_step + 1,
            # The library's names tell whole seconds only, and two writers of one second would share a file.
            filename_suffix=f".{secrets.token_hex(4)}",
            flush_secs=30,
        )

    def add(self, step: int, numbers: Mapping[str, object]) -> None:
        """Scalars of ``step``; whatever is no number is left out."""
        for name, value in numbers.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Bring what there is to where it can be seen; to a store every ten minutes, since objects are written whole."""
        self.writer.flush()
        if time.monotonic() - self.sent > BETWEEN:
            self._send()

    def close(self) -> None:
        """Bring everything to where it can be seen, and end."""
        self.writer.close()
        self._send()
        if self.remote:
            shutil.rmtree(self.folder)

    def _send(self) -> None:
        self.sent = time.monotonic()
        if not self.remote:
            return
        try:
            for file in self.folder.iterdir():
                store.write_bytes(store.join(self.remote, file.name), file.read_bytes())
        except (UsageError, WorkError) as error:  # curves are not worth a run
            print(f"TensorBoard's events are not written: {error}", file=sys.stderr)
