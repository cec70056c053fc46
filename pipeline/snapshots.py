"""Earlier classifiers of a run, each written once beside the checkpoints that name it.

Thirty of a ResNet-50 are 3 GB.  In every checkpoint they would be copied to the run's storage every two minutes, though only
one in a hundred steps makes a new one; so they lie in ``RUN/population`` and a checkpoint holds their numbers.
"""

from __future__ import annotations

import io
import re
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.data import folders, store
from pipeline.errors import WorkError

FOLDER = "population"
REMEMBERED = 3
"""Checkpoints whose snapshots are kept.  A run goes on from the last checkpoint that Ray has heard of: this one, the one before
it, or, while this one is written, the one before that."""
_NAME = re.compile(r"(\d{9})\.pt")
_MOST_BYTES = 1 << 36


def file_name(taken: int) -> str:
    """Of the snapshot taken at step ``taken``, in `FOLDER`."""
    return f"{taken:09d}.pt"


class Snapshots:
    """The folder of a run's snapshots, on this machine or in an object store; one worker writes, all read."""

    def __init__(self, run: str) -> None:
        """``run``: the run's folder or URI."""
        self.folder = store.join(store.place_of(run), FOLDER)
        self._needed: deque[frozenset[int]] = deque(maxlen=REMEMBERED)

    def read(self, taken: int) -> dict[str, Tensor]:
        """The snapshot taken at step ``taken``.

        Raises:
            WorkError: it is not there, or not whole.
        """
        place = store.join(self.folder, file_name(taken))
        try:
            return torch.load(io.BytesIO(store.read_bytes(place, most=_MOST_BYTES)), weights_only=True)
        except store.StoreError:
            raise
        except Exception as error:  # what torch's unpickler says of damage has no base of its own
            raise WorkError(f"{place}, an earlier classifier of the run, cannot be read: {error}") from error

    def resumed(self, numbers: list[int]) -> None:
        """The run goes on from a checkpoint that names ``numbers``, which are there."""
        self._needed.append(frozenset(numbers))

    def keep(self, snapshots: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Write those of ``snapshots`` that are not there yet, for a checkpoint that is about to name them, and delete what no
        checkpoint that the run may go on from needs any longer."""
        known = frozenset().union(*self._needed)
        for taken, state in snapshots.items():
            # One that a killed attempt left is not this run's: other workers may have summed in another order.
            if taken not in known:
                with store.writing(store.join(self.folder, file_name(taken))) as file:
                    torch.save(dict(state), file)
        self._needed.append(frozenset(snapshots))
        needed = frozenset().union(*self._needed)
        for entry in folders.list_folder(self.folder):
            match = _NAME.fullmatch(store.name_of(entry.place))
            if match and int(match[1]) not in needed:
                store.delete(entry.place)
