"""The manager of jobs without Ray: what it refuses, what it takes up again, and what it does about records that are damaged."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline.errors import UsageError, WorkError
from serving import job as batch_job
from serving import jobs
from serving.jobs import JobConflict, JobDriver, JobManager, TooManyJobs
from serving.ledger import JobRecord, Ledger
from tests.serving.conftest import write_images


class Started:
    """A job's process that does nothing but say that it runs, and that may say so once more when it is killed."""

    records: ClassVar[list[JobRecord]] = []

    def __init__(self, record: JobRecord, _roots: list[str]) -> None:
        self.record = record
        self.end = asyncio.get_running_loop().create_future()
        self.records.append(record)
        self.say_running()

    def say_running(self) -> None:
        Ledger(self.record.request["output"]).write_job(
            replace(self.record, state="running", pid=os.getpid(), host=os.uname().nodename)
        )

    async def kill(self) -> None:
        # A heartbeat that was under way reaches the disk after everything that the manager writes.
        threading.Timer(0.2, self.say_running).start()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with images in `in`; the manager's own loop and the processes of jobs are not started."""

    async def never(_self: object) -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr(JobManager.func_or_class, "_keep_going", never)
    monkeypatch.setattr(jobs, "Run", Started)
    Started.records.clear()
    write_images(tmp_path / "in", 2)
    return tmp_path


def run(root: Path, use: Callable[[Any], Awaitable[Any]], **settings: Any) -> Any:
    """What ``use`` gives with a new manager, as after a restart of the service."""
    config = {"roots": [str(root)], "engine": "/e/one", "provider": "auto", "max_jobs": 1, "max_pixels": 1_000_000}

    async def used() -> Any:
        made: Any = JobManager.func_or_class
        manager = made(config | settings)
        try:
            return await use(manager)
        finally:
            manager._loop.cancel()

    return asyncio.run(used())


def asked(**fields: Any) -> dict[str, Any]:
    return {"input": "in", "output": "out"} | fields


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input": "x" * 300}, "File name too long"),
        ({"output": "x" * 300}, "File name too long"),
        ({"output": "/".join(["x" * 100] * 39)}, "File name too long"),
        ({"output": "in/00000.jpg"}, "no folder that can be written to"),
        ({"output": "in/00000.jpg/below"}, "no folder that can be written to"),
        ({"input": "loop/x"}, "input: "),
        ({"output": "loop/x"}, "output: "),
        ({"max_pixels": 1_000_001}, "more than the 1000000 that this service allows"),
    ],
)
def test_what_cannot_be_used_is_the_clients_mistake(root: Path, fields: dict[str, Any], said: str) -> None:
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(UsageError, match=said) as caught:
        run(root, lambda manager: manager.submit(asked(**fields), None))
    assert "\n" not in str(caught.value)
    assert not (root / ".onepass-jobs").exists()


def test_pixels_are_limited_as_the_service_is(root: Path) -> None:
    name = run(root, lambda manager: manager.submit(asked(), None))["id"]
    stored = Ledger(str(root / "out")).job(name)
    assert stored is not None
    assert stored.request["max_pixels"] == 1_000_000


def test_a_key_finds_its_job_after_the_engine_has_changed(root: Path) -> None:
    first = run(root, lambda manager: manager.submit(asked(), "k"))
    again = run(root, lambda manager: manager.submit(asked(), "k"), engine="/e/two")
    assert (again["id"], again["state"]) == (first["id"], "queued")
    with pytest.raises(JobConflict, match="key"):
        run(root, lambda manager: manager.submit(asked(batch_size=3), "k"))


@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_a_job_that_ended_early_goes_on_under_its_key(root: Path, end: str) -> None:
    async def to_the_end(manager: Any) -> dict[str, Any]:
        job = await manager.submit(asked(), "k")
        if end == "cancelled":
            return await manager.cancel(job["id"])
        ledger = Ledger(str(root / "out"))
        record = ledger.job(job["id"])
        assert record is not None
        ledger.write_job(replace(record, state="failed", message="why", starts=3, done=1))
        return await manager.get(job["id"])

    ended = run(root, to_the_end)
    assert ended["state"] == end

    async def resume(manager: Any) -> dict[str, Any]:
        job = await manager.submit(asked(), "k")
        await manager._look()
        return job

    again = run(root, resume, engine="/e/two")
    assert (again["id"], again["state"], again["message"]) == (ended["id"], "queued", None)
    (started,) = Started.records
    assert (started.id, started.starts, started.request["engine"]) == (ended["id"], 1, "/e/two")
    assert run(root, lambda manager: manager.get(ended["id"]))["state"] == "running"


def test_a_job_that_is_done_stays_done_under_its_key(root: Path) -> None:
    name = run(root, lambda manager: manager.submit(asked(), "k"))["id"]
    ledger = Ledger(str(root / "out"))
    record = ledger.job(name)
    assert record is not None
    ledger.write_job(replace(record, state="done"))
    assert run(root, lambda manager: manager.submit(asked(), "k"))["state"] == "done"


def test_jobs_that_wait_are_counted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MOST_OPEN", 2)

    async def fill(manager: Any) -> None:
        for number in range(2):
            await manager.submit(asked(output=f"out{number}"), None)
        with pytest.raises(TooManyJobs, match="2 jobs have not ended"):
            await manager.submit(asked(output="out2"), None)
        await manager.submit(asked(output="out1"), None)  # which is there
        await manager.cancel((await manager.listing())[0]["id"])
        await manager.submit(asked(output="out2"), None)

    run(root, fill)


def test_a_cancelled_job_stays_cancelled(root: Path) -> None:
    async def cancel(manager: Any) -> None:
        name = (await manager.submit(asked(), None))["id"]
        await manager._look()
        assert (await manager.get(name))["state"] == "running"
        assert (await manager.cancel(name))["state"] == "cancelled"
        await asyncio.sleep(0.4)
        written = Ledger(str(root / "out")).job(name)
        assert written is not None
        assert written.state == "running"  # by the process, after the manager
        assert (await manager.get(name))["state"] == "cancelled"
        assert [job["state"] for job in await manager.listing()] == ["cancelled"]
        await manager._look()

    run(root, cancel)
    run(root, lambda manager: manager._look())
    assert len(Started.records) == 1


@pytest.mark.parametrize("damage", ["index", "record", "fields", "output"])
def test_a_job_that_is_damaged_stops_no_other(
    root: Path, monkeypatch: pytest.MonkeyPatch, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def spoil(manager: Any) -> str:
        name = (await manager.submit(asked(output="bad"), None))["id"]
        record = root / "bad" / "_ledger" / "jobs" / f"{name}.json"
        match damage:
            case "index":
                (root / ".onepass-jobs" / f"{name}.json").write_text("{")
            case "record":
                record.write_bytes(b"\xff")
            case "fields":
                record.write_text(json.dumps(json.loads(record.read_text()) | {"surprise": 1}))
            case _:
                write = Ledger.write_job

                def unwritable(self: Ledger, job: JobRecord) -> JobRecord:
                    if self.output.endswith("bad"):
                        raise WorkError("the disk is full")
                    return write(self, job)

                monkeypatch.setattr(Ledger, "write_job", unwritable)
        return name

    bad = run(root, spoil)

    async def go_on(manager: Any) -> None:
        good = (await manager.submit(asked(), None))["id"]
        await manager._look()
        await manager._look()
        assert [record.id for record in Started.records] == [good]
        listed = [job["id"] for job in await manager.listing()]
        assert listed == ([good, bad] if damage == "output" else [good])
        if damage != "output":
            with pytest.raises(WorkError, match="its record is damaged"):
                await manager.get(bad)
        assert list(manager._complaints) == [bad]

    run(root, go_on)


def test_a_client_that_leaves_cancels_no_half_of_a_change(root: Path) -> None:
    async def leave(manager: Any) -> list[str]:
        asking = asyncio.create_task(manager.submit(asked(), None))
        await asyncio.sleep(0)
        asking.cancel()
        async with manager._lock:
            pass
        for _ in range(100):
            if listed := await manager.listing():
                return [job["state"] for job in listed]
            await asyncio.sleep(0.02)
        return []

    assert run(root, leave) == ["queued"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UsageError("--input x: no images;\nlook"), "--input x: no images; look"),
        (ValueError("Traceback (most recent call last): secret"), "something went wrong here"),
    ],
)
def test_a_failed_job_says_one_plain_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    name = run(root, lambda manager: manager.submit(asked(), None))["id"]
    record = Ledger(str(root / "out")).job(name)
    assert record is not None
    monkeypatch.setattr(batch_job, "prepare", fails)
    JobDriver().run(asdict(record), [str(root)])
    shown = run(root, lambda manager: manager.get(name))
    assert shown["state"] == "failed"
    assert shown["message"].startswith(said)
    assert "\n" not in shown["message"]
    assert "Traceback" not in shown["message"]


def lost(root: Path, name: str, **fields: Any) -> None:
    """The record of a job as a process leaves it that dies without a word."""
    ledger = Ledger(str(root / "out"))
    record = ledger.job(name)
    assert record is not None
    ledger.write_job(replace(record, pid=2**22 + 1, **fields))  # which is no process


def test_a_job_whose_process_dies_is_started_again_a_few_times(root: Path) -> None:
    async def die(manager: Any) -> dict[str, Any]:
        name = (await manager.submit(asked(), None))["id"]
        for _ in range(jobs.MOST_STARTS):
            await manager._look()
            lost(root, name)
            manager.running[name].end.set_exception(RuntimeError("Traceback: ray::JobDriver.run()"))
        await manager._look()
        return await manager.get(name)

    job = run(root, die)
    assert [record.starts for record in Started.records] == [1, 2, 3, 4, 5]
    assert (job["state"], job["seconds_left"]) == ("failed", None)
    assert job["message"].startswith("started 5 times, and ended each time before another shard was finished; the log")
    assert "Traceback" not in job["message"]


def test_a_job_that_takes_the_service_with_it_is_given_up(root: Path) -> None:
    name = run(root, lambda manager: manager.submit(asked(), None))["id"]
    for life in range(20):
        run(root, lambda manager: manager._look())  # a new manager each time
        if run(root, lambda manager: manager.get(name))["state"] == "failed":
            break
        lost(root, name, done=min(life, 3))  # the first lives score an image each
    assert len(Started.records) == 4 + jobs.MOST_STARTS
    run(root, lambda manager: manager._look())
    assert len(Started.records) == 4 + jobs.MOST_STARTS
