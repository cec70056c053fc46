"""Which shards have killed their worker: a mark is made before a shard and taken away after it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.data import folders, store
from pipeline.errors import WorkError
from serving.ledger import Ledger

CAREFUL_AFTER = 2
"""A shard whose worker died so often is decoded in a process of its own."""
GIVE_UP_AFTER = 8
"""A shard whose worker died so often although it was decoded elsewhere has something against the engine."""


@contextmanager
def attempt(ledger: Ledger, job: str, key: str) -> Iterator[bool]:
    """Mark an attempt at a shard; gives whether to be careful.

    Marks belong to one run of one job: whoever kills a job does not make its shards suspect.

    Raises:
        WorkError: the shard has killed too many workers.
    """
    prefix = f"attempt-{job}-{key}-"
    died = sum(store.name_of(entry.place).startswith(prefix) for entry in folders.list_folder(ledger.temporary))
    if died >= GIVE_UP_AFTER:
        raise WorkError(
            f"shard {key} has killed its worker {died} times, whatever its images; look at memory and at the engine"
        )
    mark = store.join(ledger.temporary, f"{prefix}{uuid.uuid4().hex[:8]}")
    store.write_bytes(mark, b"")
    yield died >= CAREFUL_AFTER
    store.delete(mark)
