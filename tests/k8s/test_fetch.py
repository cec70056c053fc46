"""The commands that move bundles and engines, run against an S3-compatible store as the pods would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.k8s._manifests import Object, find

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@pytest.fixture
def store() -> Iterator[dict[str, str]]:
    """The environment that the Secret `onepass-s3` gives to a pod, for a store of this test's own."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    server.stop()


def run(container: Object, script: Path, environment: dict[str, str], places: dict[str, Path]) -> tuple[int, str]:
    """Status and messages of the container's command, with the pod's ``places`` in a folder of the test."""
    words = list(container["command"])
    assert words[:2] == ["python", "/scripts/transfer.py"]
    for variable in container["env"]:
        words = [word.replace(f"$({variable['name']})", variable["value"]) for word in words]
    for place, folder in places.items():
        words = [
            word.replace(f"{place}", str(folder)) if word.startswith((place, "file://")) else word for word in words
        ]
    done = subprocess.run(
        [sys.executable, str(script), *words[2:]],
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


@pytest.fixture
def script(overlays: dict[str, list[Object]], tmp_path: Path) -> Path:
    """The script as the ConfigMap gives it to the pods."""
    path = tmp_path / "transfer.py"
    path.write_text(find(overlays["s3"], "ConfigMap", "onepass-scripts")["data"]["transfer.py"])
    return path


def fetch_of(objects: list[Object], kind: str, name: str) -> Object:
    spec = find(objects, kind, name)["spec"]
    cluster = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    return cluster["headGroupSpec"]["template"]["spec"]["initContainers"][0]


def test_publish_and_fetch(
    store: dict[str, str], overlays: dict[str, list[Object]], script: Path, tmp_path: Path
) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=store["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="onepass")
    objects = overlays["s3"]
    built = tmp_path / "work/engine"
    built.mkdir(parents=True)
    (built / "model.plan").write_bytes(b"engine" * 1000)
    (built / "model.plan.json").write_text("{}")

    publish = find(objects, "Job", "export")["spec"]["template"]["spec"]["containers"][0]
    assert run(publish, script, store, {"/export": tmp_path / "work"}) == (0, "")
    keys = {entry["Key"] for entry in client.list_objects_v2(Bucket="onepass")["Contents"]}
    assert keys >= {"engines/v1/model.plan", "engines/v1/model.plan.json"}

    fetch = fetch_of(objects, "RayService", "serve")
    assert run(fetch, script, store, {"/models": tmp_path / "models"}) == (0, "")
    assert (tmp_path / "models/model.plan").read_bytes() == b"engine" * 1000
    assert (tmp_path / "models/model.plan.json").is_file()

    # A data set has folders; an object store has none.
    for key in ("train/cat/a b.jpg", "train/dog/b.jpg", "val/cat/c.jpg", "boxes.csv"):
        client.put_object(Bucket="onepass", Key=f"datasets/train/{key}", Body=key.encode())
    assert run(fetch_of(objects, "RayJob", "train"), script, store, {"/data": tmp_path / "data"}) == (0, "")
    assert (tmp_path / "data/train/cat/a b.jpg").read_bytes() == b"train/cat/a b.jpg"
    assert sum(path.is_file() for path in (tmp_path / "data").rglob("*")) == 4

    # What is not there makes the pod try again, instead of start without an engine.
    client.delete_objects(Bucket="onepass", Delete={"Objects": [{"Key": key} for key in keys]})
    status, message = run(fetch, script, store, {"/models": tmp_path / "again"})
    assert status == 1
    assert "holds no files" in message


def test_local_fetch(overlays: dict[str, list[Object]], script: Path, tmp_path: Path) -> None:
    fetch = fetch_of(overlays["local"], "RayJob", "batch")
    engine = tmp_path / "store/engines/v1"
    engine.mkdir(parents=True)
    (engine / "model.onnx").write_bytes(b"engine")
    assert run(fetch, script, {}, {"/store": tmp_path / "store", "/models": tmp_path / "models"}) == (0, "")
    assert (tmp_path / "models/model.onnx").read_bytes() == b"engine"
