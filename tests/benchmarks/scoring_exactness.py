"""Exactness of batch scoring under fire: a job whose driver, workers and nodes are killed at random ends with the rows of an
undisturbed one.

    python -m tests.benchmarks.scoring_exactness --engine ENGINE --images DIR [--rows 20000] [--kills 20] [--out result.json]

The images of DIR are linked under new names until there are enough; whatever odd files are among them count too.  Equality
is tested three ways: every input has one row, the output files have the same names, and they hold the same bytes.  Exits 1
when one of them fails, or when fewer kills happened than were asked for, or none of a driver, a worker or a node.
Needs 2 CPUs and about 4 GB; takes 10 to 60 minutes with a small engine.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.data.listing import list_images
from tests.benchmarks.nodes import Nodes, run_measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--shard-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    result = run_measured(parser.parse_args(), measure)
    every_kind = set(result["kills"]) == {"driver", "worker", "node"}
    enough = sum(result["kills"].values()) >= result["kills_asked"] and every_kind
    sys.exit(0 if enough and result["equal_names"] and result["equal_bytes"] and result["one_row_each"] else 1)


def measure(flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    names = link(flags.images, folder / "in", flags.rows)
    started = time.time()
    with Nodes("MapWorker") as nodes:
        job = start(flags, folder / "in", folder / "whole", nodes)
        assert job.wait() == 0, "the undisturbed job failed"
        undisturbed = time.time() - started
        kills, starts = disturb(flags, folder, nodes)
    whole, out = parts(folder / "whole"), parts(folder / "out")
    table = pq.read_table(folder / "out", columns=["uri", "status"])
    counts = Counter(table["uri"].to_pylist())
    return {
        "rows": table.num_rows,
        "errors": table["status"].to_pylist().count("error"),
        "one_row_each": set(counts) == names and max(counts.values()) == 1,
        "equal_names": set(whole) == set(out),
        "equal_bytes": whole == out,
        "shards": len(out),
        "kills": dict(kills),
        "kills_asked": flags.kills,
        "starts": starts,
        "seconds_undisturbed": round(undisturbed, 1),
        "seconds_disturbed": round(time.time() - started - undisturbed, 1),
    }


def link(source: Path, target: Path, rows: int, *, copy: bool = False) -> set[str]:
    """``rows`` links to the images of ``source``, or copies, in folders of a thousand; returns their names."""
    paths = list_images(source).paths
    names: set[str] = set()
    for k in range(rows):
        path = source / paths[k % len(paths)]
        link = target / f"{k // 1000:03d}" / f"{k:06d} {path.name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, link) if copy else link.symlink_to(path.resolve())
        names.add(str(link))
    return names


def disturb(flags: argparse.Namespace, folder: Path, nodes: Nodes) -> tuple[Counter[str], int]:
    """Run the job until it ends by itself, killing something now and then; kills come evenly over its progress."""
    chance = random.Random(flags.seed)
    kills: Counter[str] = Counter()
    starts = 0
    while True:
        job = start(flags, folder / "in", folder / "out", nodes)
        starts += 1
        while job.poll() is None:
            due = flags.rows * (kills.total() + 1) / (flags.kills + 2) / flags.shard_size
            if len(list((folder / "out").glob("*.parquet"))) < due or kills.total() >= flags.kills + 2:
                time.sleep(0.05)
                continue
            time.sleep(chance.random())
            kind = chance.choice(("driver", "worker", "worker", "node"))
            if kind == "driver":
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
            elif kind == "node":
                nodes.kill()
            elif not nodes.kill_worker(chance):
                continue
            kills[kind] += 1
            print(f"kill {kills.total()}: {kind}", file=sys.stderr)
        if job.returncode == 0:
            return kills, starts
        time.sleep(1)


def start(flags: argparse.Namespace, source: Path, output: Path, nodes: Nodes) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "serving.batch",
        "--engine",
        flags.engine,
        "--input",
        str(source),
        "--output",
        str(output),
    ]
    command += ["--cpus-per-worker", "1", "--shard-size", str(flags.shard_size)]
    environment = os.environ | {"RAY_ADDRESS": nodes.address}
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


if __name__ == "__main__":
    main()
