"""The service under load: throughput, latency, overload, a killed replica, a rolling update.

    python -m tests.benchmarks.service_load --engine ENGINE [--other-engine ENGINE2] --images DIR [--seconds 60] [--out result.json]

The service and the engine alone run on the same cores (``--cores``, by default the first half), the clients on the others.
Images that cannot be decoded are left out, so that every accepted request is one image scored.

1. `engine`: the engine's own batch rate with all of these cores, in this process; again after the saturated rate, whose share
   is that of the mean: machines that are shared change their speed from minute to minute.
2. `light`: one client; its latency, against the time of one image in the engine.
3. `saturated`: closed-loop clients, as many as two batches for each replica; images/s and the batch sizes that were reached.
4. `overload`: requests come at five times the saturated rate, answered or not, for ``--seconds``; p99 of the accepted, share
   of 429 and 503, memory of replicas and proxies every second, and how long until a single request is fast again.
5. `killed`: a replica is SIGKILLed under load (clients try again three times); what the first tries came to, failed requests,
   time until full rate.
6. `update` (with ``--other-engine``): the engine is replaced under load; failed requests.

`gates` says which bounds were kept; the exit status is 1 when one was not:

* saturated rate at least 0.8 of the engine's, with batches of more than half the largest size among those reached;
* p99 of the accepted under overload at most twice the time that a full queue takes at the saturated rate, before and after on
  average, plus 0.5 s; all others get 429 or 503; memory in the last quarter at most 5 % or 32 MB above that in the second; recovery within 5 s;
* no request lost to the killed replica or to the update, whoever met the dead replica told to come back (503), the full rate
  reached again, the new engine answering.
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
from typing import Any, NamedTuple

import httpx
import numpy as np
import yaml

from export.engine import open_engine
from pipeline.data.decode import ImageError, decode_image
from pipeline.data.listing import list_images
from serving.engines import engine_sha256
from tests.benchmarks.service_jobs import await_service, kill_session
from tests.serving.running import start

BATCH = 8
QUEUE = 32
LEAST_SHARE = 0.8
"""Of the engine's own rate."""
OVERLOAD = 5.0
LEAST_OVERLOAD = 4.5
"""Times the saturated rate at which requests must really have come."""
RECOVERY_SECONDS = 5.0
GROWTH = 1.05, 32
"""Memory may be so many times, or so many megabytes above, what it was."""
FULL_RATE = 0.9
"""Of the saturated rate, over `RATE_SECONDS`: what counts as recovered from a killed replica."""
RATE_SECONDS = 3.0


class Answer(NamedTuple):
    """What a request came to."""

    ended: float
    seconds: float
    code: str
    first: str
    """What the first try came to."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--other-engine")
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--cores", help="of the service, such as 0,1; the clients get the others")
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    os.environ.update(RAY_worker_niceness="0")
    every = sorted(os.sched_getaffinity(0))
    flags.cores = [int(core) for core in flags.cores.split(",")] if flags.cores else every[: max(1, len(every) // 2)]
    if len(flags.cores) % flags.replicas:
        parser.error(f"--cores: {len(flags.cores)} cannot be shared evenly by {flags.replicas} replicas")
    images = [data for data in read(flags.images) if decodable(data)]
    result: dict[str, Any] = {"cores": flags.cores, "images": len(images), "engine": engine_rate(flags)}
    os.sched_setaffinity(0, flags.cores)
    with TemporaryDirectory() as name:
        os.environ["ONEPASS_ROOTS"] = name
        options = {"cpus": len(flags.cores) // flags.replicas, "replicas": str(flags.replicas)}
        process, address, _ = start(Path(name), engine=flags.engine, batch_size=BATCH, max_queue=QUEUE, **options)
        os.sched_setaffinity(0, set(every) - set(flags.cores) or every)
        try:
            await_service(address)
            result |= asyncio.run(measure(flags, address, images, Path(name), process.pid, result["engine"]))
        finally:
            kill_session(process)
    result["gates"] = gates(result, flags)
    print(json.dumps(result, indent=1))
    if flags.out:
        flags.out.write_text(json.dumps(result, indent=1))
    sys.exit(0 if all(result["gates"].values()) else 1)


def gates(result: dict[str, Any], flags: argparse.Namespace) -> dict[str, bool]:
    """Which bounds were kept."""
    saturated, overload, killed = result["saturated"], result["overload"], result["killed"]
    kept = {
        "throughput": saturated["share_of_engine"] >= LEAST_SHARE,
        "saturated_all_scored": set(saturated["codes"]) == {"200"},
        "batches_form": saturated["batches_above_half"] > 0,
        "overload_is_one": overload["times_saturated"] >= LEAST_OVERLOAD,
        "p99_of_accepted": overload["p99_ms"] <= overload["p99_bound_ms"],
        "rest_is_told_to_come_back": {"200"} < set(overload["codes"]) <= {"200", "429", "503"},
        "memory_is_flat": flat(overload["megabytes"]),
        "recovery": overload["seconds_to_recover"] <= RECOVERY_SECONDS,
        "none_lost_to_the_killed": set(killed["codes"]) == {"200"},
        "told_to_come_back": set(killed["first_codes"]) <= {"200", "429", "503"},
        "full_rate_again": killed["seconds_to_full_rate"] is not None,
    }
    if flags.other_engine:
        update = result["update"]
        kept |= {
            "update_deployed": update["deploy"] == "ok" and update["engine"] == engine_sha256(flags.other_engine),
            "none_lost_to_the_update": set(update["codes"]) == {"200"},
        }
    return kept


def flat(megabytes: list[int]) -> bool:
    """Whether memory in the last quarter of a run is what it was in the second."""
    quarter = len(megabytes) // 4
    if not quarter or not all(megabytes):
        return False
    before, after = max(megabytes[quarter : 2 * quarter]), max(megabytes[-quarter:])
    return after <= max(GROWTH[0] * before, GROWTH[1] + before)


def read(folder: Path) -> list[bytes]:
    return [(folder / path).read_bytes() for path in list_images(folder).paths]


def decodable(data: bytes) -> bool:
    try:
        decode_image(data)
    except ImageError:
        return False
    return True


def engine_rate(flags: argparse.Namespace) -> dict[str, float]:
    """The engine alone, with all the cores that the service has; they are this thread's while it is measured."""
    others = os.sched_getaffinity(0)
    os.sched_setaffinity(0, flags.cores)
    engine = open_engine(flags.engine, threads=len(flags.cores))
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
        found[name] = round(1000 * median, 2) if count == 1 else round(count / median, 2)
    os.sched_setaffinity(0, others)
    return found


async def measure(
    flags: argparse.Namespace, address: str, images: list[bytes], folder: Path, session: int, engine: dict[str, float]
) -> dict[str, Any]:
    clients = Clients(address, images)
    many = 2 * BATCH * flags.replicas
    await clients.closed(many, 3)  # warm
    light = summary(await clients.closed(1, min(10, flags.seconds)), min(10, flags.seconds))
    light["added_ms"] = round(light["p50_ms"] - engine["milliseconds_of_one"], 1)
    await clients.batch_sizes()
    spent = min(30, flags.seconds)
    saturated = summary(await clients.closed(many, spent), spent)
    sizes = await clients.batch_sizes()
    again = await asyncio.to_thread(engine_rate, flags)
    alone = (engine["images_per_second"] + again["images_per_second"]) / 2
    rate = saturated["images_per_second"]
    saturated |= {
        "engine_afterwards": again["images_per_second"],
        "share_of_engine": round(rate / alone, 3),
        "batches_at_most": sizes,
        "batches_above_half": sizes.get("+Inf", 0) - sizes.get(f"{BATCH / 2}", 0),
    }
    result = {"light": light, "saturated": saturated}
    told(result)
    result["overload"] = told(await overloaded(clients, rate, light["p50_ms"], flags, session))
    load = asyncio.create_task(clients.closed(many, max(30, flags.seconds), tries=4))
    await asyncio.sleep(3)
    killed = time.perf_counter()
    os.kill(replicas(session)[0], signal.SIGKILL)
    answers = await load
    result["killed"] = summary(answers, max(30, flags.seconds)) | {
        "first_codes": dict(Counter(answer.first for answer in answers)),
        "seconds_to_full_rate": until_full_rate(answers, killed, FULL_RATE * rate),
    }
    if flags.other_engine:
        load = asyncio.create_task(clients.closed(many, max(30, flags.seconds)))
        await asyncio.sleep(2)
        config = yaml.safe_load((folder / "serve.yaml").read_text())
        config["applications"][0]["args"]["engine"] = flags.other_engine
        update = await asyncio.to_thread(deploy, config, folder, session)
        answers = await load
        async with httpx.AsyncClient(base_url=address, timeout=30) as client:
            now = (await client.get("/healthz")).json()["engine"]
        result["update"] = summary(answers, max(30, flags.seconds)) | {"deploy": update, "engine": now}
    return result


def told(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of a part, which whoever waits sees at once."""
    print(json.dumps(figures), file=sys.stderr, flush=True)
    return figures


async def overloaded(
    clients: Clients, rate: float, light_ms: float, flags: argparse.Namespace, session: int
) -> dict[str, Any]:
    megabytes: list[int] = []

    async def watch() -> None:
        while True:
            megabytes.append(await asyncio.to_thread(memory, session))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    answers = await clients.open(OVERLOAD * rate, flags.seconds)
    watching.cancel()
    ended = clients.last_sent  # what waited then takes a part of the time in which the service has to recover
    while (time.perf_counter() - ended) < 60:
        alone = summary(await clients.closed(1, 0.3), 0.3)
        if set(alone["codes"]) == {"200"} and alone["p50_ms"] <= 2 * light_ms + 20:
            break
    recovered = round(time.perf_counter() - ended, 1)
    spent = min(15, flags.seconds)
    afterwards = summary(await clients.closed(2 * BATCH * flags.replicas, spent), spent)["images_per_second"]
    bound = 2 * QUEUE * flags.replicas / ((rate + afterwards) / 2) + 0.5
    return summary(answers, flags.seconds) | {
        "saturated_afterwards": afterwards,
        "times_saturated": round(len(answers) / flags.seconds / rate, 2),
        "p99_bound_ms": round(1000 * bound, 1),
        "megabytes": megabytes,
        "seconds_to_recover": recovered,
    }


def summary(answers: list[Answer], seconds: float) -> dict[str, Any]:
    """Figures of the requests of a run; latency is that of the accepted."""
    times = sorted(answer.seconds for answer in answers if answer.code == "200")
    whens = sorted(answer.ended for answer in answers if answer.code == "200")
    return {
        "codes": dict(Counter(answer.code for answer in answers)),
        "images_per_second": round(len(times) / seconds, 1),
        "p50_ms": round(1000 * times[len(times) // 2], 1) if times else float("inf"),
        "p99_ms": round(1000 * times[int(0.99 * (len(times) - 1))], 1) if times else float("inf"),
        "longest_gap_s": round(float(np.diff(whens).max()), 2) if len(whens) > 1 else None,
    }


def until_full_rate(answers: list[Answer], since: float, rate: float) -> float | None:
    """Seconds from ``since`` until ``rate`` was kept for `RATE_SECONDS`, after it had been lost; None: never again."""
    whens = np.array(sorted(answer.ended for answer in answers if answer.code == "200" and answer.ended > since))
    last = max(answer.ended for answer in answers)
    lost = False
    for begin in np.arange(since, last - RATE_SECONDS, 0.25):
        kept = np.count_nonzero((whens >= begin) & (whens < begin + RATE_SECONDS)) >= rate * RATE_SECONDS
        if lost and kept:
            return round(float(begin - since), 2)
        lost = lost or not kept
    return 0.0 if not lost else None


def deploy(config: dict[str, Any], folder: Path, session: int) -> str:
    """Hand a new configuration to the Serve of this benchmark, as `serve deploy` does."""
    (folder / "update.json").write_text(json.dumps(config))
    code = (
        "import json, sys, ray; from ray import serve; from ray.serve.schema import ServeDeploySchema\n"
        "ray.init(address=sys.argv[2], namespace='serve', log_to_driver=False)\n"
        "from ray.serve.context import _get_global_client\n"
        "_get_global_client().deploy_apps(ServeDeploySchema.model_validate(json.load(open(sys.argv[1]))), _blocking=True)\n"
    )
    address, tokens = cluster(session)
    command = [sys.executable, "-c", code, str(folder / "update.json"), address]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | tokens)
    return "ok" if done.returncode == 0 else done.stderr[-300:]


def cluster(session: int) -> tuple[str, dict[str, str]]:
    """Address of the Ray that the service has started, and the variables that let others in; it is not the only one here."""
    for pid in found(session, "raylet/raylet"):
        process = Path(f"/proc/{pid}")
        variables = (pair.partition("=") for pair in (process / "environ").read_text().split("\0"))
        tokens = {name: value for name, _, value in variables if name.startswith("RAY_AUTH")}
        for word in (process / "cmdline").read_text().split("\0"):
            if word.startswith("--gcs-address="):
                return word.partition("=")[2], tokens
    raise RuntimeError("the service has no Ray; look at its log")


class Clients:
    """Clients, each request of which sends one image."""

    def __init__(self, address: str, images: list[bytes]) -> None:
        self.address, self.images, self.last_sent = address, images, 0.0
        self._seen: dict[str, float] = {}

    def _connected(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.address, limits=httpx.Limits(max_connections=None), timeout=120)

    async def _send(self, client: httpx.AsyncClient, number: int, *, tries: int = 1) -> Answer:
        begun = time.perf_counter()
        codes: list[str] = []
        while len(codes) < tries and "200" not in codes:
            if codes:
                await asyncio.sleep(0.2 * 2 ** len(codes))
            try:
                answer = await client.post("/v1/saliency", content=self.images[number % len(self.images)])
                codes.append(str(answer.status_code))
            except httpx.TransportError as error:
                codes.append(type(error).__name__)
        ended = time.perf_counter()
        return Answer(ended, ended - begun, codes[-1], codes[0])

    async def closed(self, count: int, seconds: float, *, tries: int = 1) -> list[Answer]:
        """So many clients for so long, each waiting for its answer before it asks again."""
        answers: list[Answer] = []
        end = time.perf_counter() + seconds
        async with self._connected() as client:

            async def one(number: int) -> None:
                while time.perf_counter() < end:
                    number += 1
                    answers.append(await self._send(client, number, tries=tries))

            await asyncio.gather(*(one(17 * number) for number in range(count)))
        return answers

    async def open(self, rate: float, seconds: float) -> list[Answer]:
        """So many requests a second for so long, whether the earlier ones have been answered or not."""
        begun = time.perf_counter()
        under_way: list[asyncio.Task[Answer]] = []
        async with self._connected() as client:
            while (now := time.perf_counter() - begun) < seconds:
                while len(under_way) < rate * now:
                    under_way.append(asyncio.create_task(self._send(client, len(under_way))))
                await asyncio.sleep(0.005)
            self.last_sent = time.perf_counter()
            return list(await asyncio.gather(*under_way))

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


def found(session: int, pattern: str) -> list[int]:
    """Processes of the service whose command line fits."""
    listed = subprocess.run(["pgrep", "-s", str(session), "-f", pattern], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def replicas(session: int) -> list[int]:
    return found(session, "^ray::ServeReplica:default:saliency")


def memory(session: int) -> int:
    """Resident megabytes of the replicas and the proxies."""
    pids = replicas(session) + found(session, "^ray::ProxyActor")
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in pids) // 2**20


if __name__ == "__main__":
    main()
