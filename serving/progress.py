"""How far a job has come: counted by its driver, kept in the ledger, and shown as metrics of Ray."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace

from pipeline.errors import WorkError
from serving.ledger import JobRecord, Ledger

HEARTBEAT_SECONDS = 5.0
SHOWN_ERRORS = 100
"""Error rows that a job's record holds."""


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

    ended: float | None = None
    """When the last shard was finished, once all are."""

    @property
    def rate(self) -> float | None:
        """Images per second of the workers: neither the start of the cluster nor its end counts."""
        spent = (self.ended or time.time()) - (self.first or self.started)
        return self.scored / spent if self.scored and spent > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds until the end; None while it cannot be told."""
        rate = self.rate
        return (self.total - self.done) / rate if rate and self.total is not None else None

    def record(self, job: JobRecord) -> JobRecord:
        return replace(
            job,
            total=self.total,
            done=self.done,
            errors=self.errors,
            images_per_second=self.rate or job.images_per_second,
            seconds_left=self.left,
            error_rows=self.error_rows[:SHOWN_ERRORS],
        )


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


class Gauges:
    """The numbers of the progress bar as metrics of Ray; needs a connection to a cluster."""

    def __init__(self, output: str) -> None:
        from ray.util.metrics import Gauge

        def gauge(name: str, description: str) -> Gauge:
            made = Gauge(f"onepass_batch_{name}", description=description, tag_keys=("output",))
            made.set_default_tags({"output": output})
            return made

        self._done = gauge("rows_done", "Rows of the output that are there")
        self._total = gauge("rows_total", "Rows that there will be, once they are counted")
        self._errors = gauge("rows_failed", "Rows that are errors")
        self._rate = gauge("images_per_second", "Images scored per second by the running job")
        self._left = gauge("seconds_left", "Seconds until the job ends, at its rate so far")

    def show(self, progress: Progress) -> None:
        self._done.set(progress.done)
        self._errors.set(progress.errors)
        for gauge, value in ((self._total, progress.total), (self._rate, progress.rate), (self._left, progress.left)):
            if value is not None:
                gauge.set(value)
