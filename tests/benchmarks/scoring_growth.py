"""How batch scoring grows: planning of a long synthetic listing, and whole jobs of growing sets.

    python -m tests.benchmarks.scoring_growth plan [--entries 10000000]
    python -m tests.benchmarks.scoring_growth jobs --engine ENGINE --images DIR [--sizes 2000,20000,200000] [--out result.json]

`plan` cuts and stores a listing of so many entries and extrapolates to 10^8.  `jobs` scores links to the images of DIR and
gives time per image (from the first worker's beginning to the end) and the peak memory of every kind of process.  Exits 1
when one of them is more than 10 % (for memory also more than 20 MB) above that of the smallest set.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.data.folders import Entry
from serving.inputs import Kind
from serving.ledger import Ledger
from serving.plan import LARGEST_SHARD, cut, write_plan
from tests.benchmarks.scoring_exactness import link

SMALL_MEGABYTES = 20
"""Growth of a process that does not count: helpers of Ray of 30 MB come and go by a few."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "jobs"))
    parser.add_argument("--entries", type=int, default=10**7)
    parser.add_argument("--engine")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--sizes", default="2000,20000,200000")
    parser.add_argument("--shard-size", type=int, default=512)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    result = measure_plan(flags.entries) if flags.what == "plan" else measure_jobs(flags)
    print(json.dumps(result, indent=1))
    if flags.out:
        flags.out.write_text(json.dumps(result, indent=1))
    sys.exit(1 if result.get("grown") else 0)


def listing(entries: int) -> Iterator[tuple[Kind, Entry]]:
    """Names like those of ImageNet in a bucket, in order."""
    for k in range(entries):
        group = f"n{k // 1300:08d}"
        yield (
            "image",
            Entry(f"s3://pictures/train/{group}/{group}_{k % 1300}.JPEG", 100_000 + k % 7777, f"{k * 2654435761:032x}"),
        )


def measure_plan(entries: int) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        begun, cpu = time.time(), time.process_time()
        plan = write_plan(cut(listing(entries), version="00000000", shard_size=LARGEST_SHARD), folder)
        wall, cpu = time.time() - begun, time.process_time() - cpu
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {
        "entries": entries,
        "shards": len(plan.shards),
        "seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "plan_bytes": size,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "for_1e8": {"cpu_seconds": round(cpu * 1e8 / entries), "plan_megabytes": round(size * 1e8 / entries / 1e6)},
    }


def measure_jobs(flags: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for size in (int(text) for text in flags.sizes.split(",")):
        with TemporaryDirectory() as folder:
            link(flags.images, Path(folder) / "in", size)
            result[str(size)] = measure_job(flags, Path(folder))
        print(size, json.dumps(result[str(size)]), file=sys.stderr)  # the largest may take its time
    return result | {"grown": grown(list(result.values()))}


def grown(sizes: list[dict[str, Any]]) -> list[str]:
    """What is not flat."""
    first, *others = sizes
    found = []
    for other in others:
        if other["milliseconds_per_image"] > 1.1 * first["milliseconds_per_image"]:
            found.append(f"time per image at {other['rows']} rows")
        for name, peak in other["peak_megabytes"].items():
            before = first["peak_megabytes"].get(name, 0)
            if peak > max(1.1 * before, before + SMALL_MEGABYTES):
                found.append(f"memory of {name} at {other['rows']} rows")
    return found


def measure_job(flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "serving.batch", "--engine", flags.engine, "--input", str(folder / "in")]
    command += ["--output", str(folder / "out"), "--shard-size", str(flags.shard_size)]
    environment = os.environ | {"RAY_worker_niceness": "0"}
    begun = time.time()
    job = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    peaks: dict[str, int] = {}
    done = threading.Event()
    watcher = threading.Thread(target=watch, args=(job.pid, peaks, done))
    watcher.start()
    status = job.wait()
    done.set()
    watcher.join()
    assert status == 0, "the job failed"
    (record,) = Ledger(str(folder / "out")).jobs()
    assert record.images_per_second
    return {
        "rows": record.done,
        "seconds": round(time.time() - begun, 1),
        "milliseconds_per_image": round(1000 / record.images_per_second, 3),
        "peak_megabytes": dict(sorted(peaks.items(), key=lambda item: -item[1])),
    }


def watch(session: int, peaks: dict[str, int], done: threading.Event) -> None:
    """Note the largest anonymous resident memory of every kind of process of a session.

    Pages of files are left out: whether they count as shared depends on what else runs on the machine.
    """
    while not done.wait(0.5):
        for pid in subprocess.run(["pgrep", "-s", str(session)], capture_output=True, text=True).stdout.split():
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has ended
                continue
            anonymous = sum(int(kb) for kb in re.findall(r"RssAnon:\s+(\d+) kB", status)) // 1024
            name = Path(words[0]).name if not words[0].startswith("ray::") else words[0].partition(".")[0]
            if name.startswith("python"):
                name = next((w for w in words if w.startswith("serving.") or w.endswith(".py")), name).rpartition("/")[
                    2
                ]
            peaks[name] = max(peaks.get(name, 0), anonymous)


if __name__ == "__main__":
    main()
