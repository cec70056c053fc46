"""From and to an S3 server on loopback that now and then fails, dawdles or hangs up: nothing is lost."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import folders, store
from serving import batch, lookup
from serving.inputs import open_inputs
from serving.ledger import Ledger
from tests.s3_server import Faults, s3_server

Score = Callable[..., pa.Table]


@pytest.fixture(scope="module")
def faults() -> Faults:
    return Faults()


@pytest.fixture(scope="module")
def bucket(faults: Faults) -> Iterator[str]:
    with s3_server(faults):
        files, _ = store.filesystem("s3://pictures")
        files.mkdir("pictures")
        yield "s3://pictures"


@pytest.fixture(scope="module")
def remote(bucket: str, images: Path) -> str:
    folder = f"{bucket}/in put"
    for path in sorted(images.iterdir())[:60]:
        store.write_bytes(f"{folder}/{path.name}", path.read_bytes())
    for name, data in {"ü #1%20?.jpg": b"no image", "notes.txt": b"x", "empty.png": b""}.items():
        store.write_bytes(f"{folder}/{name}", data)
    return folder


def table_of(output: str) -> pa.Table:
    parts = [entry.place for entry in folders.list_folder(output) if entry.place.endswith(".parquet")]
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


def test_objects_of_a_list_are_known_by_their_content(
    remote: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {entry.place: entry for _, entry in open_inputs(remote).entries()}
    names = [*reversed(expected), f"{remote}/00003.jpg", f"{bucket}/no/such.jpg", str(tmp_path / "here.jpg")]
    (tmp_path / "here.jpg").write_bytes(b"x")
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    asked: list[str] = []
    look_at = folders.look_at
    monkeypatch.setattr(folders, "look_at", lambda place: asked.append(place) or look_at(place))

    def found() -> list[folders.Entry]:
        asked.clear()
        return [entry for _, entry in open_inputs(str(tmp_path / "list.txt")).entries()]

    entries = found()
    assert [entry.place for entry in entries] == names
    assert entries[:63] == [expected[name] for name in names[:63]]
    assert entries[63] == folders.Entry(f"{bucket}/no/such.jpg", -1, "") and entries[64].size == 1
    assert asked == [f"{bucket}/no/such.jpg"], "a folder is listed instead of asking for its objects one by one"
    monkeypatch.setattr(lookup, "PER_PAGE", 1000)
    assert found() == entries and len(asked) == 63


def test_a_list_sends_nobody_outside_the_roots(
    remote: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a job is planned, neither: a client could have the service knock at any door with its own keys."""
    inside = f"{remote}/00003.jpg"
    names = [inside, "s3://elsewhere/x.jpg", "http://127.0.0.1:1/x.jpg", f"{bucket}/../elsewhere/x.jpg", "/etc/passwd"]
    names += [f"s3://elsewhere/many/{k}.jpg" for k in range(40)]  # so many of one folder would be listed
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    asked: list[str] = []
    filesystem, look_at = folders.filesystem, folders.look_at
    monkeypatch.setattr(folders, "filesystem", lambda place: asked.append(place) or filesystem(place))
    monkeypatch.setattr(folders, "look_at", lambda place: asked.append(place) or look_at(place))
    found = [entry for _, entry in open_inputs(str(tmp_path / "list.txt"), roots=[remote, str(tmp_path)]).entries()]
    assert set(asked) == {inside} and found[0].size > 0
    assert [(entry.place, entry.size) for entry in found[1:]] == [(name, -1) for name in names[1:]]


def test_lines_that_can_name_no_object_cost_themselves_alone(remote: str, tmp_path: Path) -> None:
    names = ["s3://bucket-alone", "s3://!/x.jpg", "nothing://knows/this.jpg", f"{remote}/00003.jpg"]
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    begun = time.monotonic()
    found = [entry for _, entry in open_inputs(str(tmp_path / "list.txt")).entries()]
    assert [entry.size for entry in found[:3]] == [-1] * 3 and found[3].size > 0
    assert time.monotonic() - begun < 10, "and are not tried again and again"


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
    before = [store.name_of(entry.place) for entry in folders.list_folder(f"{bucket}/scores")]
    changed.ledger.begin(changed.version, changed.plan)
    assert folders.list_folder(f"{bucket}/scores") == []
    prepared.ledger.begin(prepared.version, prepared.plan)
    assert [store.name_of(entry.place) for entry in folders.list_folder(f"{bucket}/scores")] == before
    with pytest.raises(store.ReadError, match="no such object"):
        store.read_bytes(f"{bucket}/gone.jpg")


def test_a_store_that_never_answers_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ATTEMPTS", 2)
    monkeypatch.setattr(store.time, "sleep", lambda _seconds: None)

    def fails() -> None:
        raise OSError("connection reset")

    with pytest.raises(store.StoreError, match=r"failed 2 times .connection reset."):
        store.retried("s3://bucket/key", fails)
