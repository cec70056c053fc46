"""What the manifests claim of Ray, tried on a local one: the service's configuration, and a head that is killed."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from tests.k8s._manifests import Object, find, need

RAY = str(Path(sys.executable).with_name("ray"))
SERVE = str(Path(sys.executable).with_name("serve"))
REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port outside of the range that Ray gives to its workers."""
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        if not 10000 <= port <= 19999:
            return port


SEAL = """
mount --bind /tmp /tmp
mount -o remount,bind,ro /
if touch /sealed 2>/dev/null; then echo "the root is writable"; exit 9; fi
exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all "$@"
"""


def sealed(command: list[str]) -> list[str]:
    """``command`` as its container runs it: root file system read-only but for /tmp, no capabilities, no new privileges.

    The user stays the one who runs the tests.  Where mounts are not allowed, the command as it is, with a warning.
    """
    wrapped = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", SEAL, "seal"]
    try:
        subprocess.run([*wrapped, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        warnings.warn(f"not tried with a read-only root: {error}", stacklevel=2)
        return command
    return [*wrapped, *command]


@contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process and all that it starts, which end with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and what it started; Ray's servers have process groups of their own."""
    for pid in (process.pid, *descendants(process.pid)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """The processes that ``pid`` and its children started."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found = parents.get(pid, [])
    for child in found:  # grows while it is read
        found.extend(parents.get(child, []))
    return found


def until(question: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true answer."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if answer := question():
            return answer
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {seconds:.0f} s")


def ask(url: str, *, token: str | None = None, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of an answer; 0 when nobody answers."""
    request = urllib.request.Request(url, data=body)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except (urllib.error.URLError, OSError):
        return 0, b""


@pytest.fixture
def short_folder() -> Iterator[str]:
    """A folder whose name leaves room for Ray's sockets, whose paths have at most 107 bytes."""
    folder = tempfile.mkdtemp(prefix="op")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of 64 pixels: what is tried here is how it is deployed."""
    import torch

    from pipeline.backbone import IMAGENET_MEAN, IMAGENET_STD, choose_taps, create_classifier, pyramid
    from pipeline.bundle import save_bundle
    from pipeline.model import build_model
    from pipeline.spec import BackboneSpec, MaskerSpec, ModelSpec

    torch.manual_seed(0)
    classifier = create_classifier("torchvision", "resnet18", outputs=3, arguments={})
    names = ["cat", "dog", "owl"]
    spec = ModelSpec(
        backbone=BackboneSpec(
            source="torchvision",
            name="resnet18",
            outputs=3,
            taps=choose_taps(pyramid("torchvision", classifier, 64), None),
        ),
        masker=MaskerSpec(),
        preset="ca",
        input_size=64,
        mask_size=16,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        class_names=names,
        data_classes=names,
        class_index=[0, 1, 2],
    )
    path = tmp_path_factory.mktemp("models") / "bundle"
    save_bundle(path, build_model(spec).eval(), spec)
    return path


def test_serve_config_is_deployed_and_answers(
    overlays: dict[str, list[Object]], bundle: Path, tmp_path: Path, short_folder: str
) -> None:
    """The local overlay's serveConfigV2, with another port and engine, on all addresses and hence with a token.

    The root file system is read-only, as in the pod.
    """
    config = yaml.safe_load(find(overlays["local"], "RayService", "serve")["spec"]["serveConfigV2"])
    port, token = free_port(), secrets.token_hex(16)
    config["http_options"]["port"] = port
    assert config["http_options"]["host"] == "0.0.0.0"
    config["applications"][0]["args"] |= {"engine": str(bundle)}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = os.environ | {
        "ONEPASS_API_TOKEN": token,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "200000000",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": short_folder,
        "RAY_TMPDIR": short_folder,  # `serve run` would else join whatever other cluster this machine has
    }
    environment.pop("RAY_ADDRESS", None)
    picture = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))[1].tobytes()
    base = f"http://127.0.0.1:{port}"
    log = tmp_path / "log"
    with running(sealed([SERVE, "run", str(file)]), environment, log) as process:

        def healthy() -> bool:
            assert process.poll() is None, log.read_text()[-3000:]
            return ask(f"{base}/healthz")[0] == 200

        try:
            until(healthy, 240, "the service answers")
        except AssertionError:
            raise AssertionError(log.read_text()[-3000:]) from None
        assert ask(f"{base}/-/healthz") == (200, b"success")  # KubeRay's probe of workers, which carries no token
        assert ask(f"{base}/v1/saliency", body=picture)[0] == 401
        assert ask(f"{base}/metrics")[0] == 401
        status, body = ask(f"{base}/v1/saliency", token=token, body=picture)
        assert status == 200, body
        answer = json.loads(body)
        assert (answer["width"], answer["height"]) == (80, 60)
        assert answer["class_name"] in ("cat", "dog", "owl")
        assert base64.b64decode(answer["mask"]).startswith(b"\x89PNG")
        status, metrics = ask(f"{base}/metrics", token=token)
        assert status == 200
        assert b"onepass_mask_area_count" in metrics


ACTOR = """
import json, os, sys, ray
for tries_left in (2, 1, 0):  # a busy machine may let it wait for longer than Ray does
    try:
        ray.init(address=sys.argv[1], namespace="test", log_to_driver=False)
        break
    except ConnectionError:
        if not tries_left: raise
@ray.remote(num_cpus=1, max_restarts=0)
class Counter:
    def __init__(self): self.value = 0
    def next(self):
        self.value += 1
        return self.value, os.getpid()
if sys.argv[2] == "make":
    counter = Counter.options(name="counter", lifetime="detached").remote()
else:
    counter = ray.get_actor("counter")
print(json.dumps(ray.get([counter.next.remote() for _ in range(2)], timeout=90)))
"""


def test_state_survives_a_killed_head(overlays: dict[str, list[Object]], tmp_path: Path, short_folder: str) -> None:
    """With Redis as in the manifests, an actor on a worker goes on under a new head.

    The head is KubeRay's command (``ray start --head`` with no CPUs); it and all its processes are killed.  The password,
    the storage namespace and the worker's patience are set as KubeRay sets them.
    """
    redis_server = need("redis-server", "redis-server")
    redis = find(overlays["gpu"], "StatefulSet", "onepass-redis")["spec"]["template"]["spec"]["containers"][0]
    options = find(overlays["gpu"], "RayService", "serve")["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"].startswith("redis://")
    redis_port, gcs_port, password = free_port(), free_port(), secrets.token_hex(16)
    data = tmp_path / "redis"
    data.mkdir()
    script = (
        redis["args"][0].replace("/data", str(data)).replace("redis-server -", f"{redis_server} - --port {redis_port}")
    )
    environment = os.environ | {
        "REDIS_PASSWORD": password,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
        "RAY_worker_niceness": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    ours = {
        "RAY_REDIS_ADDRESS": options["redisAddress"].replace("onepass-redis:6379", f"127.0.0.1:{redis_port}"),
        "RAY_external_storage_namespace": "test",
    }
    common = ["--object-store-memory=100000000", "--disable-usage-stats", "--block"]
    ports = [f"--{name}-port={free_port()}" for name in ("dashboard-agent-listen", "metrics-export")]
    start = [RAY, "start", "--head", "--num-cpus=0", f"--port={gcs_port}", "--include-dashboard=false", *common, *ports]
    start += [f"--redis-password={password}", f"--ray-client-server-port={free_port()}"]
    address = f"127.0.0.1:{gcs_port}"

    def call(what: str) -> list[list[int]]:
        done = subprocess.run(
            [sys.executable, "-c", ACTOR, address, what], env=environment, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    def listens(port: int, process: subprocess.Popen[bytes] | None = None) -> bool:
        assert process is None or process.poll() is None, "".join(p.read_text()[-2000:] for p in tmp_path.glob("*.log"))
        with socket.socket() as caller:
            return caller.connect_ex(("127.0.0.1", port)) == 0

    with running([*redis["command"], script], environment, tmp_path / "redis.log"):
        until(lambda: listens(redis_port), 20, "Redis listens")
        with running([*start, f"--temp-dir={short_folder}/1"], environment | ours, tmp_path / "head1.log") as head:
            until(lambda: listens(gcs_port, head), 120, "the head listens")
            agent = free_port()
            worker_ports = [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={free_port()}"]
            join = [RAY, "start", f"--address={address}", "--num-cpus=1", *common, *worker_ports]
            with running(join, environment, tmp_path / "worker.log") as worker:
                (first, process), (second, same) = call("make")
                assert (first, second, same) == (1, 2, process)
                # KubeRay's probes carry no token.
                until(
                    lambda: ask(f"http://127.0.0.1:{agent}/api/local_raylet_healthz") == (200, b"success"),
                    60,
                    "a probe",
                )
                kill(head)
                until(lambda: not listens(gcs_port), 20, "the killed head is gone")
                # As in a new pod, nothing of the old head is there but what Redis keeps.
                again = [*start, f"--temp-dir={short_folder}/2"]
                with running(again, environment | ours, tmp_path / "head2.log") as successor:
                    until(lambda: listens(gcs_port, successor), 120, "the new head listens")
                    # The same process goes on counting: it was neither lost nor started again.
                    assert call("find") == [[3, process], [4, process]]
                    assert worker.poll() is None
