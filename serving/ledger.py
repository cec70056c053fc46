"""What is known about an output folder: its version, its plan, the shards that are there, and the jobs that work on it.

    OUTPUT/part-<version>-<key>.parquet    one finished shard: there whole or not at all
    OUTPUT/_ledger/current.json            the version and the plan that OUTPUT/*.parquet belong to
    OUTPUT/_ledger/versions/<version>.json engine, settings and input of a version
    OUTPUT/_ledger/plans/<plan>/           its shards (`serving.plan`)
    OUTPUT/_ledger/jobs/<job>.json         progress and heartbeat of a job, alive or dead
    OUTPUT/_versions/<version>/            shards of other versions, and of inputs that have changed since

Readers of Parquet data sets leave folders with a leading underscore out, so ``OUTPUT`` reads as exactly one row per input
of the current version.  A shard is done when its file is there; nothing else has to be believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import time
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.data import folders, store
from pipeline.errors import UsageError
from serving.plan import Plan, read_plan

FORMAT = 1
ALIVE_SECONDS = 60.0
"""A running job that has not written its heartbeat for so long is taken for dead."""

_PART = re.compile(r"^part-([0-9a-f]{8})-([0-9a-f]{20})\.parquet$")


@dataclass(frozen=True, kw_only=True)
class Version:
    """What the rows of an output depend on, besides the images."""

    engine: str
    """SHA-256 of the engine or bundle."""
    input: str
    """The input, as an absolute place."""
    settings: dict[str, Any]
    """Whatever else changes rows or the way they are cut into shards."""

    @property
    def id(self) -> str:
        fields = {"format": FORMAT, "engine": self.engine, "settings": self.settings}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """Progress of one job, as its ledger file says it."""

    id: str
    state: str
    """queued, running, done, failed or cancelled; `seen_state` adds dead."""
    version: str = ""
    plan: str = ""
    total: int | None = None
    """Inputs of the whole plan; None while nobody has counted them."""
    done: int = 0
    """Rows that are there, those of earlier jobs included."""
    errors: int = 0
    """Of these rows, the ones with status error."""
    images_per_second: float | None = None
    seconds_left: float | None = None
    message: str | None = None
    error_rows: list[dict[str, str]] = field(default_factory=list)
    """Some of the rows with status error: their `uri` and `error`."""
    starts: int = 0
    """How often the service has started it."""
    idle_starts: int = 0
    """Starts since it last got any further, which is since there were other rows than at the start before."""
    done_at_start: int = 0
    """Rows that were there when it was last started."""
    queued: float = field(default_factory=time.time)
    started: float = 0.0
    updated: float = 0.0
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    request: dict[str, Any] = field(default_factory=dict)
    """How it was asked for, when it came through the service."""

    @property
    def alive(self) -> bool:
        if self.state != "running" or time.time() - self.updated > ALIVE_SECONDS:
            return False
        return (
            self.host != socket.gethostname() or Path(f"/proc/{self.pid}").is_dir() or not Path("/proc/self").is_dir()
        )

    @property
    def seen_state(self) -> str:
        return "dead" if self.state == "running" and not self.alive else self.state


class Ledger:
    """The ledger of one output folder."""

    def __init__(self, output: str) -> None:
        self.output = output
        self.folder = store.join(output, "_ledger")
        self.plans = store.join(self.folder, "plans")
        self.temporary = store.join(self.folder, "tmp")

    # -- versions ------------------------------------------------------------------------------------------------------

    def current(self) -> tuple[Version, str] | None:
        """The current version and the name of its plan; None for an output that has not been begun."""
        pointer = self._read("current.json")
        if pointer is None:
            return None
        fields = self._read(f"versions/{pointer['version']}.json")
        return None if fields is None else (Version(**fields), pointer["plan"])

    def version(self, name: str) -> Version | None:
        fields = self._read(f"versions/{name}.json")
        return None if fields is None else Version(**fields)

    def check(self, version: Version, *, but: str | None = None) -> None:
        """Refuse what would mix; ``but`` is the job that asks.

        Raises:
            UsageError: the output holds foreign Parquet files or the scores of another input, or another version of it is
                being written.
        """
        foreign = [
            e.place for e in folders.list_folder(self.output) if e.place.endswith(".parquet") and _part(e.place) is None
        ]
        if foreign:
            raise UsageError(
                f"--output {self.output}: {store.name_of(foreign[0])} is not from here; give an empty or new folder"
            )
        known = self.current()
        if known is not None and known[0].input != version.input:
            raise UsageError(f"--output {self.output} holds the scores of {known[0].input}; give another --output")
        for job in self.jobs():
            if job.id != but and job.alive and job.version not in ("", version.id):
                raise UsageError(
                    f"--output {self.output}: job {job.id} (process {job.pid} on {job.host}) is writing version "
                    f"{job.version} with another engine or setting; stop it first, or give another --output"
                )

    def begin(self, version: Version, plan: Plan) -> None:
        """Make version and plan the current ones and put the shards where they belong."""
        self._write(f"versions/{version.id}.json", asdict(version))
        self._write("current.json", {"version": version.id, "plan": plan.id})
        self.settle()

    def settle(self) -> int:
        """Leave exactly the current plan's shards in the output folder; returns how many files were moved.

        Whatever else lies there (another version, or inputs that have changed) goes to `_versions`, and shards of the
        current plan that lie there come back.  Every job does this when it begins and when it ends, always for what is
        current by then, so the last one leaves it right whoever it was.
        """
        known = self.current()
        plan = known and read_plan(self.plans, known[1])
        if known is None or plan is None:
            return 0
        wanted = {part_name(known[0].id, shard.key) for shard in plan.shards}
        present = {store.name_of(entry.place): entry.place for entry in folders.list_folder(self.output)}
        moved = 0
        for name, place in present.items():
            found = _part(place)
            if found is not None and name not in wanted:
                store.move(place, store.join(self.output, "_versions", found[0], name))
                moved += 1
        for entry in folders.list_folder(store.join(self.output, "_versions", known[0].id)):
            name = store.name_of(entry.place)
            if name in wanted:
                # Asked anew: another job may have put the shard aside since the listing.
                there = name in present and store.exists(present[name])
                store.delete(entry.place) if there else store.move(entry.place, store.join(self.output, name))
                moved += 1
        return moved

    # -- shards --------------------------------------------------------------------------------------------------------

    def part(self, version: str, key: str) -> str:
        """The final place of a shard."""
        return store.join(self.output, part_name(version, key))

    def finished(self, version: str) -> set[str]:
        """Keys of the shards of a version that are there."""
        parts = (_part(entry.place) for entry in folders.list_folder(self.output))
        return {part[1] for part in parts if part is not None and part[0] == version}

    def clean(self) -> None:
        """Remove part files that killed processes left a day ago or earlier."""
        if store.is_remote(self.output):
            return
        for entry in folders.list_folder(self.temporary):
            if time.time() - int(entry.stamp or 0) / 1e9 > 86400:
                store.delete(entry.place)

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def write_job(self, job: JobRecord) -> JobRecord:
        job = replace(job, updated=time.time())
        self._write(f"jobs/{job.id}.json", asdict(job))
        return job

    def job(self, name: str) -> JobRecord | None:
        fields = self._read(f"jobs/{name}.json")
        return None if fields is None else JobRecord(**fields)

    def jobs(self) -> list[JobRecord]:
        """All jobs of this output, oldest first."""
        names = [store.name_of(entry.place) for entry in folders.list_folder(store.join(self.folder, "jobs"))]
        found = (self.job(name.removesuffix(".json")) for name in names if name.endswith(".json"))
        return [job for job in found if job is not None]

    def _read(self, name: str) -> dict[str, Any] | None:
        data = store.read_optional(store.join(self.folder, name))
        return None if data is None else json.loads(data)

    def _write(self, name: str, fields: dict[str, Any]) -> None:
        data = json.dumps(fields, indent=1, sort_keys=True).encode()
        store.write_bytes(store.join(self.folder, name), data, temporary=self.temporary)


def part_name(version: str, key: str) -> str:
    return f"part-{version}-{key}.parquet"


def new_job_id() -> str:
    """Sorts by the time of its making."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"


def _part(place: str) -> tuple[str, str] | None:
    """(version, key) of the name of a finished shard."""
    match = _PART.match(store.name_of(place))
    return (match[1], match[2]) if match else None
