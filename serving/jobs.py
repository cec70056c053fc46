"""Batch jobs of the service.  A job's state is the record in its output's ledger; the manager only starts what is not running.

An index below the first root, ``.onepass-jobs/<id>.json``, says which outputs have jobs, so that a service that was killed,
with its whole cluster, finds its jobs again and goes on with those that had not ended.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from dataclasses import asdict, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from pipeline.data import store
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
MOST_STARTS = 3
"""A job whose process dies is started so often, and then given up."""


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
    max_pixels: int = Field(default=100_000_000, ge=1, le=1_000_000_000)
    column: str | None = Field(default=None, max_length=256)
    retry_errors: bool = False


class JobConflict(Exception):
    """The request contradicts one that is under way."""


@serve.deployment(name="jobs", num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=64)
class JobManager:
    """Keeps the jobs of the service going, and the metrics of all replicas; one replica, so that nobody else does."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.roots: list[str] = config["roots"]
        self.engine: dict[str, Any] = {"engine": config["engine"], "provider": config["provider"]}
        self.most_running: int = config["max_jobs"]
        self.running: dict[str, Any] = {}  # job id -> (actor, reference to its end)
        self.index = store.join(self.roots[0], INDEX)
        self._metrics: dict[str, tuple[float, Snapshot]] = {}
        self._lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop().create_task(self._keep_going())

    async def submit(self, request: dict[str, Any], key: str | None) -> dict[str, Any]:
        """Queue a job, or find the one that the same request has queued before; returns its record.

        Raises:
            UsageError: the input or output cannot be used.
            JobConflict: the key belongs to another request, or another request is writing the output.
        """
        async with self._lock:
            record = await asyncio.to_thread(self._submit, JobRequest.model_validate(request), key)
        return shown(record)

    def _submit(self, request: JobRequest, key: str | None) -> JobRecord:
        place = bounded(request.output, self.roots)
        wanted = request.model_dump() | self.engine | {"input": bounded(request.input, self.roots), "output": place}
        open_inputs(wanted["input"])
        name = f"key-{hashlib.sha256(key.encode()).hexdigest()[:24]}" if key else new_job_id()
        for record in self._records():
            same = record.request == wanted
            if record.id == name:
                if not same:
                    raise JobConflict("the idempotency key belongs to another request")
                return record
            if record.state not in ENDED and record.request["output"] == place:
                if not same or key:
                    raise JobConflict(f"job {record.id} is writing to {request.output}; wait for it or cancel it")
                return record
        record = Ledger(place).write_job(JobRecord(id=name, state="queued", request=wanted, pid=0, host=""))
        store.write_bytes(store.join(self.index, f"{name}.json"), json.dumps({"output": place}).encode())
        return record

    async def get(self, name: str) -> dict[str, Any] | None:
        record = await asyncio.to_thread(self._record, name)
        return None if record is None else shown(record, details=True)

    async def listing(self) -> list[dict[str, Any]]:
        """All jobs, the newest first."""
        records = await asyncio.to_thread(self._records)
        return [shown(record) for record in sorted(records, key=lambda r: (r.queued, r.id), reverse=True)]

    async def cancel(self, name: str) -> dict[str, Any] | None:
        """End a job; what it has finished stays.  One that has ended already stays as it is."""
        import ray

        async with self._lock:
            actor, _ = self.running.pop(name, (None, None))
            if actor is not None:
                ray.kill(actor)  # shards appear whole or not at all, so there is nothing to tidy up
            record = await asyncio.to_thread(self._record, name)
            if record is not None and record.state not in ENDED:
                ended = replace(record, state="cancelled", seconds_left=None)
                record = await asyncio.to_thread(Ledger(record.request["output"]).write_job, ended)
        return None if record is None else shown(record)

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

    async def _look(self) -> None:
        import ray

        for name, (_, end) in list(self.running.items()):
            ready, _ = await asyncio.to_thread(ray.wait, [end], timeout=0)
            if ready:
                del self.running[name]
                await self._ended(name, end)
        room = self.most_running - len(self.running)
        if room <= 0:
            return
        records = await asyncio.to_thread(self._records)
        for record in sorted(records, key=lambda r: (r.queued, r.id)):
            if room and record.id not in self.running and record.state not in ENDED and not record.alive:
                await self._start(record)
                room -= 1

    async def _start(self, record: JobRecord) -> None:
        import ray

        record = replace(record, starts=record.starts + 1)
        await asyncio.to_thread(Ledger(record.request["output"]).write_job, record)
        actor = ray.remote(num_cpus=0, max_restarts=0)(JobDriver).remote()
        self.running[record.id] = (actor, actor.run.remote(asdict(record), self.roots))

    async def _ended(self, name: str, end: Any) -> None:
        """A driver that dies without a word leaves its record as it was; it is started again, a few times."""
        try:
            await end
        except Exception as error:
            record = await asyncio.to_thread(self._record, name)
            if record is None or record.state in ENDED:
                return
            state = "failed" if record.starts >= MOST_STARTS else "queued"
            message = " ".join(f"the job's process ended: {error}".split())[:300]
            await asyncio.to_thread(
                Ledger(record.request["output"]).write_job, replace(record, state=state, message=message)
            )

    def _record(self, name: str) -> JobRecord | None:
        if not name or not all(c.isascii() and (c.isalnum() or c == "-") for c in name):
            return None  # a name of ours has no other characters, and no path is made of any other
        pointer = store.read_optional(store.join(self.index, f"{name}.json"))
        return None if pointer is None else Ledger(json.loads(pointer)["output"]).job(name)

    def _records(self) -> list[JobRecord]:
        names = [store.name_of(entry.place).removesuffix(".json") for entry in store.list_folder(self.index)]
        found = (self._record(name) for name in names)
        return [record for record in found if record is not None]


class JobDriver:
    """Runs one job in a process of its own, which dies with the manager."""

    def run(self, record: dict[str, Any], roots: list[str]) -> None:
        from serving.job import BatchRequest, prepare, run_job

        job = JobRecord(**record)
        ledger = Ledger(job.request["output"])
        try:
            prepared = prepare(BatchRequest(**job.request, roots=tuple(roots)))
            run_job(prepared, job=job)
        except (UsageError, WorkError) as error:
            ledger.write_job(replace(ledger.job(job.id) or job, state="failed", message=str(error)))


def shown(record: JobRecord, *, details: bool = False) -> dict[str, Any]:
    """A record as the contract shows it."""
    state = "queued" if record.seen_state == "dead" else record.state  # it will be started again
    names = ["id", "total", "done", "errors", "images_per_second", "seconds_left", "message"]
    fields = {name: getattr(record, name) for name in names} | {"state": state}
    fields |= {name: record.request.get(name) for name in ("input", "output")}
    return fields | {"error_rows": record.error_rows} if details else fields
