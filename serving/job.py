"""A batch job from request to ledger: understand, plan, score what is missing on Ray Data, and leave the output settled.

The command line (`serving.batch`) and the service's jobs run the same code.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.data import folders, store
from pipeline.data.folders import Entry
from pipeline.errors import UsageError, WorkError
from serving.cluster import Workers, connect, plan_workers
from serving.engines import engine_sha256
from serving.inputs import Inputs, Kind, open_inputs
from serving.ledger import JobRecord, Ledger, Version, new_job_id
from serving.part import read_counts, read_errors
from serving.plan import (
    LARGEST_SHARD,
    SHARDS_PER_SET,
    Plan,
    PlannedShard,
    choose_shard_size,
    cut,
    read_plan,
    write_plan,
)
from serving.progress import SHOWN_ERRORS, Heartbeat, Progress
from serving.scorer import ScorerConfig

CONTAINER_SHARD = 512
"""Rows in a shard of Parquet, whose number of rows is not known when the size is chosen."""
DECODED_SHARD, MOST_DECODED = 256, 512
"""Images in a shard whose pixels travel through Ray's object store (38 MB at 224 pixels), and the most that are allowed."""
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
    draft: bool = False
    """Decode large JPEGs at a half, a quarter or an eighth of their size."""
    topk: int = 0
    """Store the masks of so many classes of every image too; 0 for none."""
    column: str | None = None
    provider: str = "auto"
    retry_errors: bool = False
    new_plan: bool = False
    """List the input again, although something is left of the plan that the output was begun with."""
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
    kept: dict[str, int]
    """Of the finished shards that are scored again, by key: the rows that count as done already."""
    changed: bool = False
    """Whether the output holds another version, which would be put aside."""
    listed: bool = True
    """Whether the input was listed now; otherwise the plan is the one that the output was begun with."""

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
            draft=request.draft,
            topk=request.topk,
            column=request.column,
            roots=request.roots,
        )

    @property
    def pending_rows(self) -> int | None:
        """None while nobody has counted them."""
        return None if any(s.rows < 0 for s in self.pending) else sum(s.rows for s in self.pending)


def prepare(request: BatchRequest, *, dry: bool = False) -> Prepared:
    """Plan a job and find out what is left; writes nothing but the plan, and not even that when ``dry``.

    Raises:
        UsageError: input, engine or output cannot be used.
    """
    output = store.place_of(request.output)
    if not store.is_remote(output) and Path(output).exists() and not Path(output).is_dir():
        raise UsageError(f"--output {request.output} is a file; give a folder")
    ledger = Ledger(output)
    known = ledger.current()
    inputs = open_inputs(request.input, exclude=ledger.output, roots=request.roots)
    stored = None if request.new_plan else _stored(request, inputs.place, ledger, known)
    plan, version = stored or _planned(request, inputs, ledger, known, dry)
    if request.decode_cpus and any(shard.rows < 0 for shard in plan.shards):
        raise UsageError("--decode-cpus: a tar file is decoded where it is scored; leave the flag out")
    if request.decode_cpus and version.settings["shard_size"] > MOST_DECODED:
        raise UsageError(
            f"--decode-cpus: the pixels of a shard travel as one message, and this output has shards of "
            f"{version.settings['shard_size']} images; give --shard-size {DECODED_SHARD}, or leave the flag out"
        )
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
        kept={key: counts[key][0] - counts[key][1] for key in retry},
        changed=known is not None and known[0].id != version.id,
        listed=stored is None,
    )


def _planned(
    request: BatchRequest, inputs: Inputs, ledger: Ledger, known: tuple[Version, str] | None, dry: bool
) -> tuple[Plan, Version]:
    """List the input and cut it."""
    size, entries = _sized(
        inputs, request.shard_size or (known and known[0].settings["shard_size"]), request.decode_cpus
    )
    version = _version(request, inputs.place, size)
    ledger.check(version)
    shards = cut(entries, version=version.id, shard_size=size, column=request.column, roots=request.roots)
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
    return plan, version


def _stored(
    request: BatchRequest, place: str, ledger: Ledger, known: tuple[Version, str] | None
) -> tuple[Plan, Version] | None:
    """The plan that the output was begun with, while something is left of it; then nothing of the input is listed.

    Once all of it is there, the input is listed again, to find what has come, gone or changed since.
    """
    plan = known and read_plan(ledger.plans, known[1])
    if known is None or plan is None:
        return None
    size = known[0].settings["shard_size"]
    version = _version(request, place, size)
    same = (version.id, version.input) == (known[0].id, known[0].input) and request.shard_size in (None, size)
    left = same and (request.retry_errors or len(_finished(ledger, version, plan)) < len(plan.shards))
    return (plan, version) if left else None


def _version(request: BatchRequest, place: str, shard_size: int) -> Version:
    """All that the rows depend on but the images."""
    settings = {
        "max_pixels": request.max_pixels,
        "column": request.column,
        "provider": request.provider,
        "draft": request.draft,
        "shard_size": shard_size,
    }
    if request.topk:
        settings["topk"] = request.topk
    return Version(engine=engine_sha256(request.engine), input=place, settings=settings)


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
    aside = folders.list_folder(store.join(ledger.output, "_versions", version.id))
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

    A plan that an earlier job had begun is finished first; then the input is listed, and what has come or changed since is
    scored too.  ``watch`` is called after every shard, ``cancelled`` is asked as often.  ``score`` scores the pending shards and yields a
    report for each (default: on Ray Data).

    Raises:
        WorkError: the job cannot go on; what is finished stays, and the same call goes on from there.
    """
    ledger = prepared.ledger
    progress = Progress(
        total=prepared.plan.rows,
        done=prepared.done_rows,
        errors=prepared.done_errors,
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
            # Only now that others can see this job: planning may have taken long, and one of them may have begun meanwhile.
            ledger.check(prepared.version, but=job.id)
            ledger.begin(prepared.version, prepared.plan)
            ledger.clean()
            progress.error_rows = list(itertools.islice(_earlier_errors(prepared), SHOWN_ERRORS))
            watch(progress)
            latest = time.time()
            for report in (score or _score_on_ray)(prepared, progress) if prepared.pending else ():
                progress.first = progress.first or time.time() - report["seconds"]
                progress.done += report["rows"] - prepared.kept.get(report["key"], 0)
                progress.scored += report["scored"]
                progress.errors += report["errors"]
                progress.error_rows += json.loads(report["failures"])
                del progress.error_rows[SHOWN_ERRORS:]
                latest = time.time()
                watch(progress)
                if cancelled():
                    return beat.end("cancelled")
            progress.ended = latest
            ledger.settle()
            missing = {shard.key for shard in prepared.plan.shards} - ledger.finished(prepared.version.id)
            if missing and _still_current(ledger, prepared):
                raise WorkError(
                    f"{len(missing)} of {len(prepared.plan.shards)} shards are not there; run the command again"
                )
            further = None if missing else _listed_since(prepared)
            if further is None:
                return beat.end("done")
    except BaseException as error:
        beat.end("cancelled" if isinstance(error, KeyboardInterrupt) else "failed", message=_one_line(error))
        raise
    return run_job(further, job=progress.record(job), watch=watch, cancelled=cancelled, score=score)


def _listed_since(prepared: Prepared) -> Prepared | None:
    """The same job with the input as it is now, when it has changed since the plan that it went on with."""
    if prepared.listed or prepared.request.retry_errors:
        return None
    now = prepare(replace(prepared.request, new_plan=True))
    return now if now.plan.id != prepared.plan.id else None


def _earlier_errors(prepared: Prepared) -> Iterator[dict[str, str]]:
    """Error rows of the shards that are done already and stay."""
    for key in prepared.done_with_errors:
        yield from read_errors(prepared.ledger.part(prepared.version.id, key))


def _still_current(ledger: Ledger, prepared: Prepared) -> bool:
    known = ledger.current()
    return known is not None and known[0].id == prepared.version.id and known[1] == prepared.plan.id


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
    """What a record says of an error: our own words, or the name and the last line of a foreign one, never its trace."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, UsageError | WorkError):
        return " ".join(" ".join(lines).split())[:500]
    return f"{type(error).__name__}: {lines[-1].strip()}"[:300].removesuffix(": ")


def _described(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in counts.items())
