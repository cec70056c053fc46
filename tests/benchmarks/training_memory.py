"""Peak memory of a training over sets that grow tenfold, in one run.

    python -m tests.benchmarks.training_memory [--images 20000] [--steps 60] [--out result.json]

The same number of steps over N and over 10 N pictures (a thousand of the planted-evidence set under many names), each by
`python -m pipeline.train` on a cluster of its own; the peaks are the largest resident sizes that the worker's process and the
command's ever had, as the kernel keeps them.  Exits 1 when the larger set takes more than 5 % more.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.data.planted import write_planted
from tests.benchmarks.nodes import run_measured

FACTOR = 10
ORIGINALS = 1000
CLASSES = 10
MOST = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    result = run_measured(parser.parse_args(), measure)
    sys.exit(0 if max(result["ratio"].values()) <= MOST else 1)


def measure(flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    write_planted(folder / "pictures", seed=0, size=64, per_class_train=ORIGINALS // CLASSES, per_class_val=2)
    for name, factor in (("small", 1), ("large", FACTOR)):
        link(folder / "pictures", folder / name, factor * flags.images // ORIGINALS)
    small, large = (peaks(flags, folder / name, folder / f"run-{name}") for name in ("small", "large"))
    return {
        "images": [flags.images, FACTOR * flags.images],
        "megabytes": {name: [round(small[name]), round(large[name])] for name in small},
        "bytes_a_picture": {
            name: round((large[name] - small[name]) * 2**20 / ((FACTOR - 1) * flags.images)) for name in small
        },
        "ratio": {name: round(large[name] / small[name], 4) for name in small},
    }


def link(pictures: Path, data: Path, copies: int) -> None:
    """The set ``pictures`` in ``data``, each training picture under so many names."""
    for file in sorted(pictures.rglob("*")):
        if file.is_file():
            place = data / file.relative_to(pictures)
            place.parent.mkdir(parents=True, exist_ok=True)
            for k in range(copies if "train" in file.relative_to(pictures).parts else 1):
                os.link(file, place.with_stem(f"{file.stem}-{k}" if k else file.stem))


def peaks(flags: argparse.Namespace, data: Path, out: Path) -> dict[str, float]:
    """Largest resident sizes of the worker and of the command itself, in megabytes."""
    command = [sys.executable, "-m", "pipeline.train", "--preset", "fix", "--data", str(data), "--out", str(out)]
    command += ["--init", "resnet18", "--image-size", "64", "--batch-size", "16", "--steps", str(flags.steps)]
    environment = os.environ | {"RAY_ADDRESS": "local", "CUDA_VISIBLE_DEVICES": ""}
    job = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    found = {"worker": 0.0, "command": 0.0}
    while job.poll() is None:
        found["command"] = max(found["command"], peak(job.pid))
        for raylet in children(job.pid, "raylet/raylet"):
            for worker in children(raylet, "^ray::RayTrainWorker"):
                found["worker"] = max(found["worker"], peak(worker))
        time.sleep(0.1)
    assert job.returncode == 0 and min(found.values()) > 0, "the training failed"
    return found


def children(pid: int, pattern: str) -> list[int]:
    """The children of a process whose command lines match ``pattern``."""
    command = ["pgrep", "-P", str(pid), "-f", pattern]
    return [int(word) for word in subprocess.run(command, capture_output=True, text=True).stdout.split()]


def peak(pid: int) -> float:
    """Largest resident size that a process has had, in megabytes; 0 for one that is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(match[1]) / 1024 if match else 0.0


if __name__ == "__main__":
    main()
