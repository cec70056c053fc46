"""A job of the service survives the service: killed in the middle with its whole cluster, started again, every row once.

    python -m tests.benchmarks.service_jobs --engine ENGINE --images DIR [--rows 5000] [--kills 2]

Copies of the images of DIR (links would lead out of the roots) are scored by a job through the API; the service and its Ray are SIGKILLed while it runs, started
again on the same roots, and the job goes on by itself.  The rows are compared with those of an undisturbed command.

The exit status is 1 unless every life but the last was killed while the job ran, each life started it exactly once, it ended
as done, every input has one row, and the files hold the same bytes as those of the command.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pyarrow.parquet as pq

from serving.ledger import Ledger
from tests.benchmarks.scoring_exactness import link, parts
from tests.serving.running import start

WAIT_SECONDS = 1800


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--shard-size", type=int, default=128)
    flags = parser.parse_args()
    os.environ.update(RAY_worker_niceness="0")
    with TemporaryDirectory() as name:
        folder = Path(name)
        names = link(flags.images, folder / "in", flags.rows, copy=True)
        os.environ["ONEPASS_ROOTS"] = name
        output, job = folder / "out", ""
        states: list[str] = []
        for life in range(flags.kills + 1):
            process, address, _ = start(folder, engine=flags.engine)
            await_service(address)
            if not job:
                asked = {"input": str(folder / "in"), "output": str(output), "shard_size": flags.shard_size}
                job = httpx.post(f"{address}/v1/jobs", json=asked, timeout=60).json()["id"]
            listed = [found["id"] for found in httpx.get(f"{address}/v1/jobs", timeout=60).json()]
            assert listed == [job], listed
            # Killed evenly over the job; it may have got a little further meanwhile.
            wanted = (
                (life + 1) * -(-flags.rows // flags.shard_size) // (flags.kills + 1) if life < flags.kills else None
            )
            state = await_job(address, job, output, wanted)
            states.append(state["state"])
            print(f"life {life + 1}: {state['state']}, {state['done']} of {state['total']} rows", file=sys.stderr)
            kill_session(process)
        record = Ledger(str(output)).job(job)
        table = pq.read_table(output)
        command = [sys.executable, "-m", "serving.batch", "--engine", flags.engine, "--input", str(folder / "in")]
        command += ["--output", str(folder / "whole"), "--shard-size", str(flags.shard_size), "--cpus-per-worker", "1"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"RAY_ADDRESS": ""})
        result = {
            "states": states,
            "starts": record.starts if record is not None else 0,
            "rows": table.num_rows,
            "one_row_each": sorted(table["uri"].to_pylist()) == sorted(names),
            "equal_bytes": parts(output) == parts(folder / "whole"),
            "kills": flags.kills,
        }
        print(json.dumps(result, indent=1))
        as_meant = states == ["running"] * flags.kills + ["done"] and result["starts"] == flags.kills + 1
        sys.exit(0 if as_meant and result["one_row_each"] and result["equal_bytes"] else 1)


def await_service(address: str) -> None:
    deadline = time.time() + WAIT_SECONDS
    while True:
        try:
            if httpx.get(f"{address}/healthz", timeout=5).status_code == 200:
                return
            said = "it does not answer as healthy"
        except httpx.TransportError as error:
            said = repr(error)
        assert time.time() < deadline, f"the service did not start: {said}"
        time.sleep(0.5)


def await_job(address: str, job: str, output: Path, shards: int | None) -> dict:
    """Wait until so many shards are there, or for the end of the job; its state then."""
    deadline = time.time() + WAIT_SECONDS
    while True:
        state = httpx.get(f"{address}/v1/jobs/{job}", timeout=60).json()
        if state["state"] in ("done", "failed", "cancelled") or (shards and len(parts(output)) >= shards):
            return state
        assert time.time() < deadline, state
        time.sleep(0.2)


def kill_session(process: subprocess.Popen) -> None:
    """SIGKILL everything that the service has started, Ray and all."""
    found = subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in map(int, found):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


if __name__ == "__main__":
    main()
