"""Batch jobs of the service.  A job's state is the record in its output's ledger; the manager only starts what is not running.

An index below the first root, ``.onepass-jobs/<id>.json``, says which outputs have jobs, so that a service that was killed,
with its whole cluster, finds its jobs again and goes on with those that had not ended.  It also says which were cancelled:
the process of such a job may write one more record while it is being killed, and only the manager writes the index.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Coroutine, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from pipeline.data import folders, store
from pipeline.errors import UsageError, WorkError
from serving.inputs import open_inputs
from serving.ledger import JobRecord, Ledger, new_job_id
from serving.metrics import Snapshot
from serving.roots import bounded

log = logging.getLogger("ray.serve")

INDEX = ".onepass-jobs"
ENDED = ("done", "failed", "cancelled")
LOOK_SECONDS = 2.0
METRICS_SECONDS = 30.0
"""A replica that has not told its metrics for so long is gone."""
MOST_STARTS = 5
"""A job that dies so often in a row without having got any further is given up, whether its process died or the service."""
MOST_OPEN = 100
"""Jobs that may be queued or running at a time; beyond it requests are told to come back (429)."""
KILL_SECONDS = 10.0
"""So long a cancelled job's process is waited for."""

_T = TypeVar("_T")


class JobRequest(BaseModel):
    """What a client asks for; the engine is the service's own."""

    model_config = ConfigDict(extra="forbid")

    input: str = Field(min_length=1, max_length=4096)
    output: str = Field(min_length=1, max_length=4096)
    batch_size: int = Field(default=16, ge=1, le=4096)
    workers: int | None = Field(default=None, ge=1, le=100_000)
    cpus_per_worker: int | None = Field(default=None, ge=1, le=1024)
    num_gpus: float | None = Field(default=None, ge=0, le=64)
    shard_size: int | None = Field(default=None, ge=1, le=1_000_000)
    max_pixels: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """By default, and at most, the service's own limit."""
    column: str | None = Field(default=None, max_length=256)
    retry_errors: bool = False


class JobConflict(Exception):
    """The request contradicts one that is under way."""


class TooManyJobs(Exception):
    """So many jobs are waiting that no further one is taken."""


@serve.deployment(name="jobs", num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=64)
class JobManager:
    """Keeps the jobs of the service going, and the metrics of all replicas; one replica, so that nobody else does."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.roots: list[str] = config["roots"]
        self.engine: dict[str, Any] = {"engine": config["engine"], "provider": config["provider"]}
        self.max_pixels: int = config["max_pixels"]
        self.most_running: int = config["max_jobs"]
        self.running: dict[str, Run] = {}
        self.index = store.join(self.roots[0], INDEX)
        self._metrics: dict[str, tuple[float, Snapshot]] = {}
        self._lock = asyncio.Lock()
        self._complaints: dict[str, str] = {}
        self._settled: set[str] = set()
        """Jobs that had ended when they were last looked at, which only `_submit` begins again."""
        self._loop = asyncio.get_running_loop().create_task(self._keep_going())

    async def submit(self, request: dict[str, Any], key: str | None) -> dict[str, Any]:
        """Queue a job, or find the one that the same request has queued before; returns its record.

        With a key, a job that was cancelled or has failed is queued again under its old name.

        Raises:
            UsageError: the input or output cannot be used.
            JobConflict: the key belongs to another request, or another request is writing the output.
            TooManyJobs: `MOST_OPEN` jobs have not ended.
            WorkError: the store does not answer.
        """
        asked = JobRequest.model_validate(request)
        return shown(await self._alone(asyncio.to_thread(self._submit, asked, key)))

    def _submit(self, request: JobRequest, key: str | None) -> JobRecord:
        asked = self._understood(request)
        name = f"key-{hashlib.sha256(key.encode()).hexdigest()[:24]}" if key else new_job_id()
        known = self._record(name)
        if known is not None and not _same(known, asked):
            raise JobConflict("the idempotency key belongs to another request")
        if known is not None and known.state not in ("cancelled", "failed"):
            return known
        unended = [record for record in self._records(but=self._settled) if record.state not in ENDED]
        for record in unended:
            if record.request["output"] == asked["output"]:
                if key or not _same(record, asked):
                    raise JobConflict(f"job {record.id} is writing to {request.output}; wait for it or cancel it")
                return record
        if len(unended) >= MOST_OPEN:
            raise TooManyJobs(f"{len(unended)} jobs have not ended; wait for some of them or cancel some")
        wanted = {"max_pixels": self.max_pixels} | asked | self.engine
        fresh = JobRecord(id=name, state="queued", request=wanted, pid=0, host="")
        if known is not None:
            fresh = replace(fresh, total=known.total, done=known.done, errors=known.errors, error_rows=known.error_rows)
        record = Ledger(asked["output"]).write_job(fresh)
        self._point(name, asked["output"])
        self._settled.discard(name)
        return record

    def _understood(self, request: JobRequest) -> dict[str, Any]:
        """The request with absolute places, as far as the client has said anything.

        Raises:
            UsageError: a place cannot be used, or is none of the client's business; or too many pixels are asked for.
        """
        if request.max_pixels is not None and request.max_pixels > self.max_pixels:
            raise UsageError(
                f"max_pixels: {request.max_pixels} is more than the {self.max_pixels} that this service allows; give less"
            )
        source = _looked_at("input", lambda: bounded(request.input, self.roots))
        _looked_at("input", lambda: open_inputs(source))
        place = _looked_at("output", lambda: bounded(request.output, self.roots))
        _looked_at("output", lambda: _check_output(place, request.output))
        asked = request.model_dump(exclude={"max_pixels"} if request.max_pixels is None else None)
        return asked | {"input": source, "output": place}

    async def get(self, name: str) -> dict[str, Any] | None:
        record = await asyncio.to_thread(self._record, name)
        return None if record is None else shown(record, details=True)

    async def listing(self) -> list[dict[str, Any]]:
        """All jobs, the newest first."""
        records = await asyncio.to_thread(lambda: list(self._records()))
        return [shown(record) for record in sorted(records, key=lambda r: (r.queued, r.id), reverse=True)]

    async def cancel(self, name: str) -> dict[str, Any] | None:
        """End a job; what it has finished stays.  One that has ended already stays as it is.

        Raises:
            WorkError: the store does not answer.
        """
        record = await self._alone(self._cancel(name))
        return None if record is None else shown(record)

    async def _cancel(self, name: str) -> JobRecord | None:
        record = await asyncio.to_thread(self._record, name)
        if record is None or record.state in ENDED:
            return record
        place = record.request["output"]
        await asyncio.to_thread(self._point, name, place, cancelled=True)
        run = self.running.pop(name, None)
        if run is not None:
            await run.kill()  # shards appear whole or not at all, so there is nothing to tidy up
        ended = replace(record, state="cancelled", seconds_left=None)
        return await asyncio.to_thread(Ledger(place).write_job, ended)

    async def gather(self, replica: str, snapshot: Snapshot) -> list[Snapshot]:
        """Take the metrics of one replica and give those of all that have been heard of lately."""
        now = time.monotonic()
        self._metrics[replica] = (now, snapshot)
        self._metrics = {name: kept for name, kept in self._metrics.items() if now - kept[0] < METRICS_SECONDS}
        return [kept for _, kept in self._metrics.values()]

    def check_health(self) -> None:
        if self._loop.done():
            raise RuntimeError("the loop that starts jobs has ended")

    async def _keep_going(self) -> None:
        while True:
            try:
                async with self._lock:
                    await self._look()
            except Exception:  # a store that is away now may be there in the next round
                log.exception("cannot look after the jobs")
            await asyncio.sleep(LOOK_SECONDS)

    async def _alone(self, change: Coroutine[Any, Any, _T]) -> _T:
        """Make one change after the other, each to its end: a client that leaves cancels its request, not half a change."""

        async def locked() -> _T:
            async with self._lock:
                return await change

        return await asyncio.shield(asyncio.create_task(locked()))

    async def _look(self) -> None:
        """See which jobs have ended, and start others; what is wrong with one of them is no reason to leave the rest."""
        for name, run in list(self.running.items()):
            if run.end.done():
                del self.running[name]
                try:
                    await self._ended(name, run)
                except Exception as error:
                    self._complain(name, error)
        room = self.most_running - len(self.running)
        if room <= 0:
            return
        records = await asyncio.to_thread(lambda: list(self._records(but=self._settled)))
        self._settled |= {record.id for record in records if record.state in ENDED}
        for record in sorted(records, key=lambda r: (r.queued, r.id)):
            if room and record.id not in self.running and record.state not in ENDED and not record.alive:
                try:
                    room -= await self._start(record)
                except Exception as error:
                    self._complain(record.id, error)

    async def _start(self, record: JobRecord) -> bool:
        """Start a job; False for one that is given up instead.

        It is counted before it begins, so that a job that takes the service with it each time (the machine's memory, say)
        is given up as well.
        """
        idle = record.idle_starts if record.done == record.done_at_start else 0
        if idle >= MOST_STARTS:
            message = f"started {idle} times, and ended each time before another shard was finished"
            record = replace(record, state="failed", seconds_left=None, message=f"{message}; {_see_log(record.id)}")
        else:
            counts = {"starts": record.starts + 1, "idle_starts": idle + 1, "done_at_start": record.done}
            record = replace(record, **counts)
        await asyncio.to_thread(Ledger(record.request["output"]).write_job, record)
        if record.state == "failed":
            return False
        self.running[record.id] = Run(record, self.roots)
        return True

    async def _ended(self, name: str, run: Run) -> None:
        """A driver that dies without a word leaves its record as it was; it is started again, if not for ever."""
        error = run.end.exception()
        if error is None:
            return
        log.error("the process of job %s ended", name, exc_info=error)
        record = await asyncio.to_thread(self._record, name)
        if record is None or record.state in ENDED:
            return
        message = f"the job's process ended before its work; {_see_log(name)}"
        again = replace(record, state="queued", message=message)
        await asyncio.to_thread(Ledger(record.request["output"]).write_job, again)

    def _point(self, name: str, output: str, *, cancelled: bool = False) -> None:
        pointer = {"output": output, "cancelled": cancelled}
        store.write_bytes(store.join(self.index, f"{name}.json"), json.dumps(pointer).encode())

    def _record(self, name: str) -> JobRecord | None:
        """A job's record; None when there is no such job.

        Raises:
            WorkError: it cannot be read.
        """
        if not name or not all(c.isascii() and (c.isalnum() or c == "-") for c in name):
            return None  # a name of ours has no other characters, and no path is made of any other
        place = store.join(self.index, f"{name}.json")
        data = store.read_optional(place)
        if data is None:
            return None
        try:
            pointer = json.loads(data)
            record = Ledger(pointer["output"]).job(name)
            cancelled = pointer.get("cancelled", False)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise WorkError(
                f"job {name}: its record is damaged; delete {place}, and the same request makes it anew"
            ) from error
        if record is not None and cancelled and record.state not in ENDED:
            record = replace(record, state="cancelled", seconds_left=None)
        return record

    def _records(self, *, but: Collection[str] = ()) -> Iterator[JobRecord]:
        """All jobs whose records can be read, without those in ``but``, which are not even asked for."""
        for entry in folders.list_folder(self.index):
            name = store.name_of(entry.place).removesuffix(".json")
            if name in but:
                continue
            try:
                record = self._record(name)
            except Exception as error:  # whatever is wrong with one job, the others go on
                self._complain(name, error)
            else:
                if record is not None:
                    yield record

    def _complain(self, name: str, error: Exception) -> None:
        """Log what is wrong with a job, once."""
        if self._complaints.get(name) != str(error):
            self._complaints[name] = str(error)
            log.warning("job %s is left as it is", name, exc_info=error)


class Run:
    """The process of a job that this manager has started."""

    def __init__(self, record: JobRecord, roots: list[str]) -> None:
        import ray

        self._actor: Any = ray.remote(num_cpus=0, max_restarts=0)(JobDriver).remote()
        self.end: asyncio.Future[None] = asyncio.ensure_future(_awaited(self._actor.run.remote(asdict(record), roots)))

    async def kill(self) -> None:
        """End it, and wait until it has ended."""
        import ray

        ray.kill(self._actor)
        await asyncio.wait([self.end], timeout=KILL_SECONDS)
        if self.end.done():
            self.end.exception()  # which nobody has to be told of


async def _awaited(reference: Any) -> None:
    await reference


class JobDriver:
    """Runs one job in a process of its own, which dies with the manager."""

    def run(self, record: dict[str, Any], roots: list[str]) -> None:
        from serving.job import BatchRequest, prepare, run_job

        job = JobRecord(**record)
        ledger = Ledger(job.request["output"])
        try:
            prepared = prepare(BatchRequest(**job.request, roots=tuple(roots)))
            run_job(prepared, job=job)
            return
        except (UsageError, WorkError) as error:
            message = " ".join(str(error).split())
        except Exception:
            log.exception("job %s failed", job.id)
            message = f"something went wrong here; {_see_log(job.id)}"
        ledger.write_job(replace(ledger.job(job.id) or job, state="failed", message=message))


def shown(record: JobRecord, *, details: bool = False) -> dict[str, Any]:
    """A record as the contract shows it."""
    state = "queued" if record.seen_state == "dead" else record.state  # it will be started again
    names = ["id", "total", "done", "errors", "images_per_second", "seconds_left", "message"]
    fields = {name: getattr(record, name) for name in names} | {"state": state}
    fields |= {name: record.request.get(name) for name in ("input", "output")}
    return fields | {"error_rows": record.error_rows} if details else fields


def _see_log(name: str) -> str:
    return f"the log of the service has more under job {name}"


def _same(record: JobRecord, asked: dict[str, Any]) -> bool:
    """Whether a client asked for the same; the engine is none of what it asks for, and may change between two tries."""
    return {name: record.request.get(name) for name in asked} == asked


def _looked_at(field: str, look: Callable[[], _T]) -> _T:
    """What ``look`` finds; names that no file can have, or that lead in circles, are the client's mistake."""
    try:
        return look()
    except (OSError, RuntimeError, ValueError, store.ReadError) as error:
        reason = getattr(error, "strerror", None) or "no such place can be read or written"
        raise UsageError(f"{field}: it cannot be used ({reason}); look at the path") from error


def _check_output(place: str, text: str) -> None:
    """Refuse an output that no ledger can be written to.  Raises `UsageError` or `OSError`."""
    if store.is_remote(place):
        return
    Path(store.join(place, "_ledger", "versions", "x" * 100)).exists()  # OSError when our own names would be too long
    nearest = next(folder for folder in (Path(place), *Path(place).parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"output {text[:200]}: it is no folder that can be written to; give another")
