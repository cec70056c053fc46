"""From and to an S3 server on loopback that now and then fails, dawdles or hangs up: nothing is lost."""

from __future__ import annotations

import io
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving import batch, store
from serving.inputs import open_inputs
from serving.ledger import Ledger

Score = Callable[..., pa.Table]


class Faults:
    """What the server does to the requests of objects, in order: every ``every``-th one fails in one way or another."""

    def __init__(self) -> None:
        self.every = 0
        self.count = 0
        self.done: dict[str, int] = {"500": 0, "slow": 0, "dropped": 0}
        self._lock = threading.Lock()

    def next(self) -> str | None:
        with self._lock:
            self.count += 1
            if not self.every or self.count % self.every:
                return None
            kind = ("500", "dropped", "slow")[self.count // self.every % 3]
            self.done[kind] += 1
            return kind


class Faulty:
    """A WSGI application with faults in front of it."""

    def __init__(self, application: Any, faults: Faults) -> None:
        self.application, self.faults = application, faults

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        fault = self.faults.next()
        if fault == "500":
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        if fault == "dropped":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        if fault == "slow":
            time.sleep(0.5)
        return self.application(environ, start_response)


@pytest.fixture(scope="module")
def faults() -> Faults:
    return Faults()


@pytest.fixture(scope="module")
def bucket(faults: Faults) -> Iterator[str]:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = Faulty(DomainDispatcherApplication(create_backend_app), faults)
    server = make_server("127.0.0.1", 0, application, threaded=True)  # type: ignore[arg-type]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    files, _ = store.filesystem("s3://pictures")
    files.mkdir("pictures")
    yield "s3://pictures"
    server.shutdown()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def remote(bucket: str, images: Path) -> str:
    folder = f"{bucket}/in put"
    for path in sorted(images.iterdir())[:60]:
        store.write_bytes(f"{folder}/{path.name}", path.read_bytes())
    for name, data in {"ü #1%20?.jpg": b"no image", "notes.txt": b"x", "empty.png": b""}.items():
        store.write_bytes(f"{folder}/{name}", data)
    return folder


def table_of(output: str) -> pa.Table:
    parts = [entry.place for entry in store.list_folder(output) if entry.place.endswith(".parquet")]
    return pa.concat_tables(pq.read_table(io.BytesIO(store.read_bytes(part))) for part in parts).sort_by("uri")


def test_listing_a_bucket(remote: str, bucket: str) -> None:
    inputs = open_inputs(remote)
    entries = [entry for _, entry in inputs.entries()]
    assert len(entries) == 62
    assert f"{remote}/ü #1%20?.jpg" in {entry.place for entry in entries}
    assert all(entry.stamp and entry.size >= 0 for entry in entries)
    assert inputs.others == {".txt": 1}
    assert [e.place for _, e in open_inputs(f"{remote}/0000[12].jpg").entries()] == [
        f"{remote}/0000{k}.jpg" for k in (1, 2)
    ]
    assert [e.place for _, e in open_inputs(f"{remote}/00003.jpg").entries()] == [f"{remote}/00003.jpg"]


def test_a_job_among_faults_loses_nothing(
    remote: str, bucket: str, images: Path, bundle: Path, faults: Faults, score_here: Score, tmp_path: Path
) -> None:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    faults.every = 7
    try:
        batch.main(["--engine", str(bundle), "--input", remote, "--output", f"{bucket}/scores", "--batch-size", "8"])
    finally:
        faults.every = 0
        ray.shutdown()
    assert min(faults.done.values()) >= 3, faults.done
    rows = table_of(f"{bucket}/scores").to_pylist()
    names = [path.name for path in sorted(images.iterdir())[:60]]
    assert [row["uri"] for row in rows] == [
        f"{remote}/{name}" for name in sorted([*names, "empty.png", "ü #1%20?.jpg"])
    ]
    assert {row["uri"].rpartition("/")[2]: row["error"][:11] for row in rows if row["status"] == "error"} == {
        "empty.png": "undecodable",
        "ü #1%20?.jpg": "undecodable",
    }
    assert [job.state for job in Ledger(f"{bucket}/scores").jobs()] == ["done"]
    here = {Path(row["uri"]).name: row for row in score_here(bundle, images, tmp_path / "here").to_pylist()}
    for row in rows:
        name = row["uri"].rpartition("/")[2]
        if row["status"] == "ok":
            assert {k: v for k, v in row.items() if k not in ("uri", "score")} == {
                k: v for k, v in here[name].items() if k not in ("uri", "score")
            }
            assert row["score"] == pytest.approx(here[name]["score"], abs=1e-6)


def test_versions_and_vanished_objects(
    remote: str, bucket: str, bundle: Path, other_bundle: Path, tmp_path: Path
) -> None:
    from serving.job import BatchRequest, prepare

    prepared = prepare(BatchRequest(engine=str(bundle), input=remote, output=f"{bucket}/scores", batch_size=8))
    assert prepared.pending == []
    changed = prepare(BatchRequest(engine=str(other_bundle), input=remote, output=f"{bucket}/scores", batch_size=8))
    assert len(changed.pending) == len(changed.plan.shards)
    before = [store.name_of(entry.place) for entry in store.list_folder(f"{bucket}/scores")]
    changed.ledger.begin(changed.version, changed.plan)
    assert store.list_folder(f"{bucket}/scores") == []
    prepared.ledger.begin(prepared.version, prepared.plan)
    assert [store.name_of(entry.place) for entry in store.list_folder(f"{bucket}/scores")] == before
    with pytest.raises(store.ReadError, match="no such object"):
        store.read_bytes(f"{bucket}/gone.jpg")


def test_a_store_that_never_answers_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ATTEMPTS", 2)
    monkeypatch.setattr(store.time, "sleep", lambda _seconds: None)

    def fails() -> None:
        raise OSError("connection reset")

    with pytest.raises(store.StoreError, match=r"failed 2 times .connection reset."):
        store.retried("s3://bucket/key", fails)
