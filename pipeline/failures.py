"""Which error keeps coming back: what tells a lost machine, after which a run goes on, from a fault that stays.

Ray Train starts the workers again after any failure.  A worker that fails by an error of its own leaves
``RUN/failures/<rank>.json``; when the same error has come back at the same step a few times, the workers end without
training, and the command says what it was.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass

from torch.distributed import DistError

from pipeline.data import folders, store
from pipeline.errors import UsageError, WorkError

MOST = 3
"""Times that the same error may happen at the same step."""
FOLDER = "failures"
ECHOES = ("/gloo/", "NCCL error", "Connection closed by peer", "Connection reset by peer")
"""Words of the errors that collectives raise on all other workers when one is lost; the lost one has said why, if it could."""
STORE_ERROR, REFUSALS = (
    "AWS Error",
    ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH"),
)
"""What Arrow says of an object store, through which Ray writes checkpoints, and the kinds that waiting does not mend."""
CHANGING = re.compile(r"\btmp\w+|0x[0-9a-f]+|\d+")
"""What differs between two messages of the same fault: temporary folders, addresses, numbers of processes and bytes."""


@dataclass(frozen=True)
class Failure:
    """An error of one worker."""

    step: int
    """At which the worker had started."""
    error: str
    """On one line."""
    count: int = 1
    """How often it has happened in a row."""


def record(run: str, rank: int, step: int, error: BaseException) -> None:
    """Note that worker ``rank``, started at ``step``, failed by ``error``; not where it only lost sight of something else.

    Says on stderr when the note cannot be written, so that the error itself is what the caller goes on to raise.
    """
    lost_another = isinstance(error, RuntimeError | ConnectionError) and any(word in str(error) for word in ECHOES)
    store_is_away = (
        isinstance(error, OSError) and STORE_ERROR in str(error) and not any(kind in str(error) for kind in REFUSALS)
    )
    if lost_another or store_is_away or isinstance(error, DistError | store.StoreError):
        return
    words = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
    try:
        before = _read(run, str(rank))
        same = before is not None and (before.step, _lasting_words(before.error)) == (step, _lasting_words(words))
        failure = Failure(step, words, before.count + 1 if before is not None and same else 1)
        store.write_bytes(_place(run, str(rank)), json.dumps(asdict(failure)).encode())
    except (UsageError, WorkError, store.ReadError) as unwritten:
        print(f"the failure of worker {rank} is not noted: {unwritten}", file=sys.stderr)


def lasting(run: str, step: int) -> Failure | None:
    """The failure that has come back `MOST` times at ``step``; none while there is hope."""
    names = [store.name_of(place).removesuffix(".json") for place in _notes(run)]
    found = [failure for name in names if (failure := _read(run, name)) is not None]
    return next((failure for failure in found if failure.step == step and failure.count >= MOST), None)


def forget(run: str) -> None:
    """Start counting anew: whoever runs the command again may have mended the fault."""
    for place in _notes(run):
        store.delete(place)


def _lasting_words(words: str) -> str:
    return CHANGING.sub("#", words)


def _notes(run: str) -> list[str]:
    folder = store.join(store.place_of(run), FOLDER)
    try:
        return [entry.place for entry in folders.list_folder(folder)]
    except store.ReadError as error:
        raise WorkError(f"the run's folder {run} cannot be read: {error}; check that it is yours") from error


def _place(run: str, name: str) -> str:
    return store.join(store.place_of(run), FOLDER, f"{name}.json")


def _read(run: str, name: str) -> Failure | None:
    data = store.read_optional(_place(run, name))
    return Failure(**json.loads(data)) if data else None
