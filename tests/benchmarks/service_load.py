"""The service under load: throughput, latency, overload, a killed replica, a rolling update.

    python -m tests.benchmarks.service_load --engine ENGINE [--other-engine ENGINE2] --images DIR [--seconds 60] [--out result.json]

1. `engine`: the engine's own batch rate with the service's threads, in this process.
2. `light`: one client; its latency, against the time of one image in the engine.
3. `saturated`: closed-loop clients, as many as two batches; images/s and the batch sizes that were reached.
4. `overload`: five times as many clients as fill the queue, for `--seconds`; p99 of the accepted, share of 429 and 503,
   memory of the replica before and after, and how long until a single request is fast again.
5. `killed`: a replica is SIGKILLed under load (clients try again three times); failed requests, time until full rate.
6. `update` (with `--other-engine`): the engine is replaced under load; failed requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import yaml

from export.engine import open_engine
from pipeline.data.listing import list_images
from tests.benchmarks.service_jobs import await_service, kill_session
from tests.serving.running import start

BATCH = 8
QUEUE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--other-engine")
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    os.environ.update(RAY_worker_niceness="0")
    images = [(flags.images / path).read_bytes() for path in list_images(flags.images).paths]
    result: dict[str, Any] = {"engine": engine_rate(flags)}
    with TemporaryDirectory() as name:
        os.environ["ONEPASS_ROOTS"] = name
        options = {"batch_size": BATCH, "max_queue": QUEUE, "cpus": flags.cpus, "replicas": str(flags.replicas)}
        process, address, _ = start(Path(name), engine=flags.engine, **options)
        try:
            await_service(address)
            result |= asyncio.run(measure(flags, address, images, Path(name), process.pid))
        finally:
            kill_session(process)
    print(json.dumps(result, indent=1))
    if flags.out:
        flags.out.write_text(json.dumps(result, indent=1))


def engine_rate(flags: argparse.Namespace) -> dict[str, float]:
    engine = open_engine(flags.engine, threads=flags.cpus)
    side = engine.info.input_size
    found = {}
    for name, count in (("milliseconds_of_one", 1), ("images_per_second", BATCH)):
        batch = np.zeros((count, side, side, 3), dtype=np.uint8)
        engine.infer(batch)
        times = []
        for _ in range(20):
            begun = time.perf_counter()
            engine.infer(batch)
            times.append(time.perf_counter() - begun)
        median = statistics.median(times)
        found[name] = round(1000 * median, 2) if count == 1 else round(count / median, 1)
    return found


async def measure(
    flags: argparse.Namespace, address: str, images: list[bytes], folder: Path, session: int
) -> dict[str, Any]:
    clients = Clients(address, images)
    await clients.run(2 * BATCH, 3)  # warm
    light = await clients.run(1, min(10, flags.seconds))
    await clients.batch_sizes()
    saturated = await clients.run(2 * BATCH, min(30, flags.seconds))
    sizes = await clients.batch_sizes()
    before = memory(session)
    overload = await clients.run(5 * QUEUE, flags.seconds)
    ended = time.time()
    while (await clients.run(1, 0.3))["p50_ms"] > 2 * light["p50_ms"] + 20 and time.time() - ended < 60:
        continue
    overload |= {
        "megabytes_before": before,
        "megabytes_after": memory(session),
        "seconds_to_recover": round(time.time() - ended, 1),
    }
    result = {"light": light, "saturated": saturated | {"batch_sizes": sizes}, "overload": overload}
    load = asyncio.create_task(clients.run(2 * BATCH, min(60, flags.seconds), tries=4))
    await asyncio.sleep(3)
    os.kill(replicas(session)[0], signal.SIGKILL)
    result["killed"] = await load
    if flags.other_engine:
        load = asyncio.create_task(clients.run(2 * BATCH, min(60, flags.seconds)))
        await asyncio.sleep(2)
        config = yaml.safe_load((folder / "serve.yaml").read_text())
        config["applications"][0]["args"]["engine"] = flags.other_engine
        update = await asyncio.to_thread(deploy, config, session)
        result["update"] = await load | {"deploy": update}
    return result


def deploy(config: dict[str, Any], session: int) -> str:
    """Hand a new configuration to the Serve of this benchmark, as `serve deploy` does."""
    (Path("/tmp") / f"onepass-update-{session}.json").write_text(json.dumps(config))
    code = (
        "import json, sys, ray; from ray import serve; from ray.serve.schema import ServeDeploySchema\n"
        "ray.init(address='auto', namespace='serve', log_to_driver=False)\n"
        "from ray.serve.context import _get_global_client\n"
        "_get_global_client().deploy_apps(ServeDeploySchema.model_validate(json.load(open(sys.argv[1]))), _blocking=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"/tmp/onepass-update-{session}.json"], capture_output=True, text=True
    )
    return "ok" if done.returncode == 0 else done.stderr[-300:]


class Clients:
    """Closed-loop clients, each sending one image after the other."""

    def __init__(self, address: str, images: list[bytes]) -> None:
        self.address, self.images = address, images
        self._seen: dict[str, float] = {}

    async def run(self, count: int, seconds: float, *, tries: int = 1) -> dict[str, Any]:
        codes: Counter[str] = Counter()
        accepted: list[tuple[float, float]] = []  # (when it ended, how long it took)
        end = time.perf_counter() + seconds
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.address, limits=limits, timeout=120) as client:

            async def one(number: int) -> None:
                k = number
                while time.perf_counter() < end:
                    k += 1
                    begun = time.perf_counter()
                    code = "failed"
                    for attempt in range(tries):
                        try:
                            answer = await client.post("/v1/saliency", content=self.images[k % len(self.images)])
                        except httpx.TransportError:
                            code = "broken"
                        else:
                            code = str(answer.status_code)
                        if code in ("200", "413", "422"):
                            accepted.append((time.perf_counter(), time.perf_counter() - begun))
                            break
                        await asyncio.sleep(0.2 * 2**attempt if tries > 1 else 0.02)
                    codes[code] += 1

            await asyncio.gather(*(one(17 * number) for number in range(count)))
        times = sorted(took for _, took in accepted)
        gaps = np.diff(sorted(when for when, _ in accepted)) if len(accepted) > 1 else np.zeros(1)
        return {
            "clients": count,
            "codes": dict(codes),
            "images_per_second": round(len(times) / seconds, 1),
            "p50_ms": round(1000 * times[len(times) // 2], 1) if times else float("inf"),
            "p99_ms": round(1000 * times[int(0.99 * (len(times) - 1))], 1) if times else float("inf"),
            "longest_gap_s": round(float(gaps.max()), 2),
        }

    async def batch_sizes(self) -> dict[str, int]:
        """How many batches were at most so large, since the last call."""
        async with httpx.AsyncClient(base_url=self.address, timeout=30) as client:
            text = (await client.get("/metrics")).text
        now: Counter[str] = Counter()
        for line in text.splitlines():
            if line.startswith("onepass_batch_size_bucket"):
                now[line.partition('le="')[2].partition('"')[0]] += float(line.split()[-1])  # type: ignore[assignment]
        since = {size: int(count - self._seen.get(size, 0)) for size, count in now.items()}
        self._seen = dict(now)
        return since


def replicas(session: int) -> list[int]:
    found = subprocess.run(
        ["pgrep", "-s", str(session), "-f", "^ray::ServeReplica:default:saliency"], capture_output=True, text=True
    )
    return [int(pid) for pid in found.stdout.split()]


def memory(session: int) -> int:
    """Resident megabytes of the replicas."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in replicas(session)) // 2**20


if __name__ == "__main__":
    main()
