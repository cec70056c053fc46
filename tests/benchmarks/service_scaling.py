"""The service grows when requests queue up: one replica, then a second, while nobody loses a request.

    python -m tests.benchmarks.service_scaling --engine ENGINE --images DIR [--most 2] [--seconds 120]

``replicas=1:MOST``; closed-loop clients, as many as three batches for each of the most replicas, for ``--seconds``.  Which
replicas work is asked of the metrics, which name them.  The exit status is 1 unless the last replica came to work before the
end and every request was scored or told to come back (429, 503).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from tests.benchmarks.service_jobs import await_service, kill_session
from tests.benchmarks.service_load import Clients, decodable, read, summary
from tests.serving.running import start

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--most", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120)
    flags = parser.parse_args()
    os.environ.update(RAY_worker_niceness="0")
    images = [data for data in read(flags.images) if decodable(data)]
    with TemporaryDirectory() as name:
        os.environ["ONEPASS_ROOTS"] = name
        process, address, _ = start(
            Path(name), engine=flags.engine, batch_size=BATCH, max_queue=8 * BATCH, replicas=f"1:{flags.most}"
        )
        try:
            await_service(address)
            result = asyncio.run(measure(flags, address, images))
        finally:
            kill_session(process)
    result["gates"] = {
        "all_came_to_work": len(result["seconds_until_it_worked"]) == flags.most,
        "none_lost": {"200"} <= set(result["codes"]) <= {"200", "429", "503"},
    }
    print(json.dumps(result, indent=1))
    sys.exit(0 if all(result["gates"].values()) else 1)


async def measure(flags: argparse.Namespace, address: str, images: list[bytes]) -> dict[str, Any]:
    load = asyncio.create_task(Clients(address, images).closed(3 * BATCH * flags.most, flags.seconds))
    begun = time.perf_counter()
    seen: dict[str, float] = {}
    async with httpx.AsyncClient(base_url=address, timeout=30) as client:
        while not load.done():
            for replica in working((await client.get("/metrics")).text):
                seen.setdefault(replica, round(time.perf_counter() - begun, 1))
            await asyncio.wait([load], timeout=1)
    return summary(await load, flags.seconds) | {"seconds_until_it_worked": seen}


def working(metrics: str) -> list[str]:
    """Replicas that have scored an image."""
    lines = [
        line for line in metrics.splitlines() if line.startswith("onepass_images_total{") and float(line.split()[-1])
    ]
    return [line.partition('replica="')[2].partition('"')[0] for line in lines]


if __name__ == "__main__":
    main()
