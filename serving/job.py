"""A batch job from request to ledger: understand, plan, score what is missing on Ray Data, and leave the output settled.

The command line (`serving.batch`) and the service's jobs run the same code.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.data import store
from pipeline.data.store import Entry
from pipeline.errors import UsageError, WorkError
from serving.cluster import Workers, connect, plan_workers
from serving.engines import engine_sha256
from serving.inputs import Inputs, Kind, open_inputs
from serving.ledger import JobRecord, Ledger, Version, new_job_id
from serving.plan import LARGEST_SHARD, SHARDS_PER_SET, Plan, PlannedShard, choose_shard_size, cut, write_plan
from serving.scorer import ScorerConfig, read_counts, read_errors

HEARTBEAT_SECONDS = 5.0
SHOWN_ERRORS = 100
"""Error rows that a job's record holds."""
CONTAINER_SHARD = 512
"""Rows in a shard of Parquet, whose number of rows is not known when the size is chosen."""
DECODED_SHARD = 256
"""Images in a shard whose pixels travel through Ray's object store: 38 MB at 224 pixels."""
TALLY_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """What a job is asked to do; the fields are the flags of `serving.batch`."""

    engine: str
    input: str
    output: str
    batch_size: int = 16
    workers: int | None = None
    cpus_per_worker: int | None = None
    num_gpus: float | None = None
    decode_cpus: int = 0
    autoscale: bool = False
    shard_size: int | None = None
    max_pixels: int = 100_000_000
    column: str | None = None
    provider: str = "auto"
    retry_errors: bool = False
    roots: tuple[str, ...] = ()
    """Images outside these places are not read, whatever a list or a link says; empty: no limit."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A job before it runs: what there is, and what is left."""

    request: BatchRequest
    version: Version
    plan: Plan
    ledger: Ledger
    pending: list[PlannedShard]
    """Shards to score; with ``retry_errors``, also finished ones with failed rows."""
    done_rows: int
    """Rows that are there and stay."""
    done_errors: int
    done_with_errors: list[str]
    """Keys of the finished shards that hold these."""
    changed: bool = False
    """Whether the output holds another version, which would be put aside."""

    def scorer_config(self, *, threads: int, run: str = "") -> ScorerConfig:
        """What a worker with so many CPUs is to do."""
        request = self.request
        return ScorerConfig(
            engine=request.engine,
            engine_sha256=self.version.engine,
            output=self.ledger.output,
            version=self.version.id,
            job=run,
            batch_size=request.batch_size,
            threads=threads,
            provider=request.provider,
            max_pixels=request.max_pixels,
            column=request.column,
            roots=request.roots,
        )

    @property
    def pending_rows(self) -> int | None:
        """None while nobody has counted them."""
        return None if any(s.rows < 0 for s in self.pending) else sum(s.rows for s in self.pending)


@dataclass
class Progress:
    """Counts of a job that is running; `Progress.record` is what the ledger shows."""

    total: int | None
    done: int
    errors: int
    started: float = field(default_factory=time.time)
    error_rows: list[dict[str, str]] = field(default_factory=list)
    scored: int = 0
    """Rows that this run has scored."""
    first: float | None = None
    """When the first worker could begin."""

    @property
    def rate(self) -> float | None:
        spent = time.time() - (self.first or self.started)
        return self.scored / spent if self.scored and spent > 0 else None

    def record(self, job: JobRecord) -> JobRecord:
        rate = self.rate
        left = (self.total - self.done) / rate if rate and self.total is not None else None
        return replace(
            job,
            total=self.total,
            done=self.done,
            errors=self.errors,
            images_per_second=rate,
            seconds_left=left,
            error_rows=self.error_rows[:SHOWN_ERRORS],
        )


def prepare(request: BatchRequest, *, dry: bool = False) -> Prepared:
    """Plan a job and find out what is left; writes nothing but the plan, and not even that when ``dry``.

    Raises:
        UsageError: input, engine or output cannot be used.
    """
    output = store.place_of(request.output)
    if not store.is_remote(output) and Path(output).exists() and not Path(output).is_dir():
        raise UsageError(f"--output {request.output} is a file; give a folder")
    inputs = open_inputs(request.input, exclude=output)
    ledger = Ledger(output)
    known = ledger.current()
    settings = {"max_pixels": request.max_pixels, "column": request.column}
    digest = engine_sha256(request.engine)
    size, entries = _sized(
        inputs, request.shard_size or (known and known[0].settings["shard_size"]), request.decode_cpus
    )
    version = Version(engine=digest, input=inputs.place, settings=settings | {"shard_size": size})
    ledger.check(version)
    shards = cut(entries, version=version.id, shard_size=size)
    with TemporaryDirectory() as passing:
        plan = write_plan(
            shards,
            passing if dry else ledger.plans,
            temporary=passing if dry else ledger.temporary,
            others=inputs.others,
        )
    if not plan.shards:
        left_out = f" ({_described(plan.others)} left out)" if plan.others else ""
        raise UsageError(f"--input {request.input}: no images, Parquet or tar files{left_out}; look at the path")
    finished = _finished(ledger, version, plan)
    counts = tally(ledger, version, finished)
    retry = {key for key, (_, errors) in counts.items() if errors} if request.retry_errors else set()
    kept = {key: count for key, count in counts.items() if key not in retry}
    return Prepared(
        request=request,
        version=version,
        plan=plan,
        ledger=ledger,
        pending=[shard for shard in plan.shards if shard.key not in kept],
        done_rows=sum(rows for rows, _ in counts.values()) - sum(counts[key][1] for key in retry),
        done_errors=sum(errors for _, errors in kept.values()),
        done_with_errors=[key for key, (_, errors) in kept.items() if errors],
        changed=known is not None and known[0].id != version.id,
    )


def _sized(inputs: Inputs, shard_size: int | None, decode_cpus: int) -> tuple[int, Iterator[tuple[Kind, Entry]]]:
    """The shard size, and the listing.  An output keeps the size that it was begun with, or every cut would move."""
    entries = inputs.entries()
    if shard_size is not None:
        return shard_size, entries
    largest = DECODED_SHARD if decode_cpus else LARGEST_SHARD
    head = list(itertools.islice(entries, LARGEST_SHARD * SHARDS_PER_SET))
    images = sum(kind == "image" for kind, _ in head)
    return min(largest, choose_shard_size(images) if images else CONTAINER_SHARD), itertools.chain(head, entries)


def _finished(ledger: Ledger, version: Version, plan: Plan) -> list[str]:
    aside = store.list_folder(store.join(ledger.output, "_versions", version.id))
    there = ledger.finished(version.id) | {entry.place.rsplit("-", 1)[-1].removesuffix(".parquet") for entry in aside}
    return [shard.key for shard in plan.shards if shard.key in there]


def tally(ledger: Ledger, version: Version, keys: list[str]) -> dict[str, tuple[int, int]]:
    """(rows, errors) of finished shards by key."""

    def counts(key: str) -> tuple[int, int]:
        place = ledger.part(version.id, key)
        if not store.exists(place):
            place = store.join(ledger.output, "_versions", version.id, store.name_of(place))
        return read_counts(place)

    with ThreadPoolExecutor(TALLY_THREADS) as pool:
        return dict(zip(keys, pool.map(counts, keys), strict=True))


def run_job(
    prepared: Prepared,
    *,
    job: JobRecord | None = None,
    watch: Callable[[Progress], None] = lambda _progress: None,
    cancelled: Callable[[], bool] = lambda: False,
    score: Callable[[Prepared, Progress], Iterator[dict[str, Any]]] | None = None,
) -> JobRecord:
    """Score what is left and write the ledger; returns the job's last record, of state done or cancelled.

    ``watch`` is called after every shard, ``cancelled`` is asked as often.  ``score`` scores the pending shards and yields a
    report for each (default: on Ray Data).

    Raises:
        WorkError: the job cannot go on; what is finished stays, and the same call goes on from there.
    """
    ledger = prepared.ledger
    ledger.begin(prepared.version, prepared.plan)
    ledger.clean()
    progress = Progress(
        total=prepared.plan.rows,
        done=prepared.done_rows,
        errors=prepared.done_errors,
        error_rows=list(itertools.islice(_earlier_errors(prepared), SHOWN_ERRORS)),
    )
    job = job or JobRecord(id=new_job_id(), state="queued", request=asdict(prepared.request))
    job = replace(
        job,
        state="running",
        version=prepared.version.id,
        plan=prepared.plan.id,
        started=progress.started,
        host=socket.gethostname(),
        pid=os.getpid(),
        message=None,
    )
    beat = Heartbeat(ledger, job, progress)
    try:
        with beat:
            watch(progress)
            for report in (score or _score_on_ray)(prepared, progress) if prepared.pending else ():
                scored = report["retried"] or report["rows"]
                progress.first = progress.first or time.time() - report["seconds"]
                progress.done += scored
                progress.scored += scored
                progress.errors += report["errors"]
                progress.error_rows += json.loads(report["failures"])
                del progress.error_rows[SHOWN_ERRORS:]
                watch(progress)
                if cancelled():
                    return beat.end("cancelled")
            ledger.settle()
            missing = {shard.key for shard in prepared.plan.shards} - ledger.finished(prepared.version.id)
            if missing and _still_current(ledger, prepared):
                raise WorkError(
                    f"{len(missing)} of {len(prepared.plan.shards)} shards are not there; run the command again"
                )
            return beat.end("done")
    except BaseException as error:
        beat.end("cancelled" if isinstance(error, KeyboardInterrupt) else "failed", message=_one_line(error))
        raise


def _earlier_errors(prepared: Prepared) -> Iterator[dict[str, str]]:
    """Error rows of the shards that are done already and stay."""
    for key in prepared.done_with_errors:
        yield from read_errors(prepared.ledger.part(prepared.version.id, key))


def _still_current(ledger: Ledger, prepared: Prepared) -> bool:
    known = ledger.current()
    return known is not None and known[0].id == prepared.version.id and known[1] == prepared.plan.id


class Heartbeat:
    """Writes a job's record every few seconds, so that others can tell a running job from a dead one."""

    def __init__(self, ledger: Ledger, job: JobRecord, progress: Progress) -> None:
        self._ledger, self._job, self._progress = ledger, job, progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._ledger.write_job(self._progress.record(self._job))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def end(self, state: str, message: str | None = None) -> JobRecord:
        """Write the last record."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        record = replace(self._progress.record(self._job), state=state, message=message)
        if state == "done":
            record = replace(record, total=record.done, seconds_left=0.0)
        return self._ledger.write_job(record)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                self._ledger.write_job(self._progress.record(self._job))
            except WorkError:  # progress that cannot be written now can be written later
                continue


def _score_on_ray(prepared: Prepared, progress: Progress) -> Iterator[dict[str, Any]]:
    """Score the pending shards on Ray Data, one row for each; yields their reports as they come."""
    connect()
    from serving.flow import score_shards

    request = prepared.request
    workers: Workers = plan_workers(
        workers=request.workers,
        cpus=request.cpus_per_worker,
        gpus=request.num_gpus,
        shards=len(prepared.pending),
        reserved=request.decode_cpus,
        autoscale=request.autoscale,
    )
    yield from score_shards(prepared, workers, progress)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _described(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in counts.items())
