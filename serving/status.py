"""What the ledger of an output folder says, for people."""

from __future__ import annotations

import time

from pipeline.data import store
from pipeline.errors import UsageError
from serving.batch import duration
from serving.job import tally
from serving.ledger import Ledger
from serving.plan import read_plan


def print_status(output: str) -> None:
    """Print how far the current version is, exactly, and what each job said last.

    Raises:
        UsageError: the folder has no ledger.
    """
    place = store.place_of(output)
    ledger = Ledger(place)
    known = ledger.current()
    plan = known and read_plan(ledger.plans, known[1])
    if known is None or plan is None:
        raise UsageError(f"--output {output}: no job has begun here; start one without --status")
    version = known[0]
    there = ledger.finished(version.id)
    counts = tally(ledger, version, [shard.key for shard in plan.shards if shard.key in there])
    rows, errors = (sum(column) for column in zip(*counts.values(), strict=True)) if counts else (0, 0)
    total = plan.rows
    share = f" ({100 * rows / total:.1f} %)" if total else ""
    print(f"version {version.id}: engine {version.engine[:12]}, input {version.input}")
    print(
        f"{rows} of {total if total is not None else '?'} rows{share}, {errors} errors, {len(counts)} of {len(plan.shards)} shards"
    )
    for job in ledger.jobs():
        rate = f", {job.images_per_second:.1f} images/s" if job.images_per_second else ""
        left = f", {duration(job.seconds_left)} left" if job.seconds_left and job.seen_state == "running" else ""
        said = f": {job.message}" if job.message else ""
        ago = duration(max(0.0, time.time() - job.updated))
        print(
            f"job {job.id}: {job.seen_state}{rate}{left}, last heard of {ago} ago (process {job.pid} on {job.host}){said}"
        )
