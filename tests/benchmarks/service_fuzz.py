"""Fuzzing the service: damaged images, odd files, odd requests; none may end in a 500, a crash, or a leak.

    python -m tests.benchmarks.service_fuzz --engine ENGINE --images DIR [--requests 10000] [--seed 0]

The exit status is 1 unless every answer was one of `EXPECTED` without a trace, the replicas that were there at the start are
there at the end and healthy, at least `LEAST_SCORED` of the requests scored an image and one or more started a job, and the
replicas' memory at the end is no more than `MOST_GROWTH` megabytes above that after the first fifth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from pipeline.data.listing import list_images
from tests.benchmarks.service_jobs import await_service, kill_session
from tests.benchmarks.service_load import memory, replicas
from tests.serving.running import start

CLIENTS = 8
LEAST_SCORED = 0.05
MOST_GROWTH = 100
EXPECTED = {200, 202, 400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 429, 503}
WORDS = [
    "in",
    "..",
    "/etc",
    "s3://b/k",
    "file:///etc/passwd",
    "\0",
    "*",
    "[",
    "",
    "x" * 5000,
    "ü",
    None,
    1,
    -1,
    1e308,
    [],
    {},
    True,
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    os.environ.update(RAY_worker_niceness="0")
    images = [(flags.images / path).read_bytes() for path in list_images(flags.images).paths]
    with TemporaryDirectory() as name:
        os.environ["ONEPASS_ROOTS"] = name
        (Path(name) / "in").mkdir()
        for k in range(4):
            (Path(name) / "in" / f"{k}.jpg").write_bytes(images[k % len(images)])
        process, address, _ = start(
            Path(name), engine=flags.engine, max_images=4, max_queue=64, models=f"m={flags.engine}"
        )
        try:
            await_service(address)
            result = asyncio.run(fuzz(address, images, flags, process.pid))
        finally:
            kill_session(process)
    print(json.dumps(result, indent=1))
    sys.exit(0 if all(result["gates"].values()) else 1)


async def fuzz(address: str, images: list[bytes], flags: argparse.Namespace, session: int) -> dict[str, Any]:
    codes: Counter[str] = Counter()
    unexpected: list[str] = []
    numbers = iter(range(flags.requests))
    alive = replicas(session)
    marks: list[int] = []

    async with httpx.AsyncClient(base_url=address, timeout=120) as client:

        async def work() -> None:
            for number in numbers:
                if number % (flags.requests // 10 or 1) == 0:
                    marks.append(memory(session))
                chance = random.Random(flags.seed * 1_000_003 + number)
                method, path, options = request(chance, images)
                try:
                    answer = await client.request(method, path, **options)
                except (httpx.TransportError, httpx.InvalidURL) as error:
                    codes[type(error).__name__] += 1
                    if not isinstance(error, (httpx.InvalidURL, httpx.LocalProtocolError)):
                        unexpected.append(f"{number}: {error!r}")
                    continue
                codes[str(answer.status_code)] += 1
                if answer.status_code not in EXPECTED or "Traceback" in answer.text[:10_000]:
                    unexpected.append(f"{number}: {method} {path[:80]} {answer.status_code} {answer.text[:200]}")

        await asyncio.gather(*(work() for _ in range(CLIENTS)))
        healthy = (await client.get("/healthz")).status_code == 200
    marks.append(memory(session))
    gates = {
        "all_expected": not unexpected,
        "healthy": healthy,
        "same_replica": bool(alive) and replicas(session) == alive,
        "images_scored": codes["200"] >= LEAST_SCORED * flags.requests,
        "jobs_started": codes["202"] > 0,
        "no_leak": min(marks) > 0 and marks[-1] <= marks[min(2, len(marks) - 1)] + MOST_GROWTH,
    }
    return {
        "requests": flags.requests,
        "codes": dict(codes),
        "unexpected": unexpected[:20],
        "replica_megabytes": marks,
        "gates": gates,
    }


def request(chance: random.Random, images: list[bytes]) -> tuple[str, str, dict[str, Any]]:
    kind = chance.random()
    if kind < 0.6:
        return (
            "POST",
            "/v1/saliency",
            {"content": damaged(chance, images), "headers": headers(chance), "params": params(chance)},
        )
    if kind < 0.75:
        files = [("image", (f"{k}", damaged(chance, images))) for k in range(chance.randrange(6))]
        path = chance.choice(["/v1/saliency", "/v1/models/m/saliency", "/v1/models/%2e%2e/saliency"])
        return (
            "POST",
            path,
            {"files": files}
            if files
            else {"content": b"--x--", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        )
    if kind < 0.9:
        keys = ["input", "output", "batch_size", "workers", "column", "retry_errors", "engine", "zz"]
        body: Any = {key: chance.choice(WORDS) for key in chance.sample(keys, chance.randrange(len(keys)))}
        if chance.random() < 0.2:  # one that can be done
            body = {"input": "in", "output": f"out{chance.randrange(20)}", "retry_errors": chance.random() < 0.5}
        content = json.dumps(body).encode() if chance.random() < 0.8 else damaged(chance, images)[:70_000]
        return (
            "POST",
            "/v1/jobs",
            {
                "content": content,
                "headers": {"Content-Type": chance.choice(["application/json"] * 9 + ["text/plain"])}
                | (
                    {"Idempotency-Key": str(chance.choice(WORDS))[:300].encode("ascii", "replace").decode()}
                    if chance.random() < 0.2
                    else {}
                ),
            },
        )
    path = "/" + "/".join(
        str(chance.choice(["v1", "jobs", "saliency", "models", "healthz", "..", "%00", "%2f", "static", "é", "app.js"]))
        for _ in range(chance.randrange(5))
    )
    return chance.choice(["GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS", "PATCH"]), path, {}


def damaged(chance: random.Random, images: list[bytes]) -> bytes:
    """A real file with some bytes changed, cut off, doubled, or mixed with another; sometimes none at all."""
    data = bytearray(chance.choice(images))
    for _ in range(chance.randrange(4)):
        if not data:
            break
        at = chance.randrange(len(data)) if chance.random() < 0.5 else chance.randrange(min(64, len(data)))
        match chance.randrange(5):
            case 0:
                data[at] = chance.randrange(256)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = chance.randbytes(chance.randrange(64))
            case 3:
                data[at : at + 16] = bytes(16)
            case _:
                data[at:] = chance.choice(images)[at:]
    return bytes(data) if chance.random() < 0.98 else chance.randbytes(chance.randrange(2000))


def headers(chance: random.Random) -> dict[str, str]:
    accept = ["*/*", "image/png", "application/json", "image/png;q=0.1,*/*", ",,;;=", "x" * 300]
    kinds = [
        "image/jpeg",
        "text/plain",
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "",
    ]
    found = {"Accept": chance.choice(accept)}
    if chance.random() < 0.3:
        found["Content-Type"] = chance.choice(kinds)
    if chance.random() < 0.1:
        found["X-Request-Id"] = chance.choice(["a", "x" * 5000, "'; --", "%0d%0aSet-Cookie: a"])
    return found


def params(chance: random.Random) -> dict[str, str]:
    return {"topk": chance.choice(["1", "0", "-1", "1e9", "999", "ü", "", "[]"])} if chance.random() < 0.2 else {}


if __name__ == "__main__":
    main()
