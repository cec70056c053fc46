"""The whole road on one folder of images: train, judge, export, score — what `make demo` runs.

    python -m pipeline.demo                             # on the embedded planted-evidence set, about 8 minutes on 2 cores
    python -m pipeline.demo --data DIR --budget 30m     # on an image folder; the budget is for both trainings together

Every stage is the command that a user would type, and is printed as such.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli import Parser, run
from pipeline.errors import UsageError, WorkError

RUNS = Path("runs")
PLANTED_SEED = 0
PLANTED_BUDGET = 380.0
"""Seconds for both trainings on the embedded set."""
CA_SHARE = 0.6
"""Share of the budget that `ca` gets; its steps cost more than those of `fix`."""


def parser() -> Parser:
    """The command line."""
    p = Parser("pipeline.demo", "Walk the whole road: train, judge, export and score.")
    p.add_argument("--data", metavar="DIR", help="image folder with train/ and val/ (default: the embedded set)")
    p.add_argument("--budget", metavar="TIME", help="time for both trainings together (default: 30m with --data)")
    p.add_argument(
        "--train-args", default="", metavar="ARGS", help="further arguments of both trainings, in one string"
    )
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Walk the road; leaves its results in ``runs/demo`` or ``runs/<name of DIR>``.

    Raises:
        UsageError: no such data.
        WorkError: a stage failed.
    """
    arguments = parser().parse_args(argv)
    from pipeline.planning import parse_time

    started = time.monotonic()
    if arguments.data:
        data = Path(arguments.data)
        if not (data / "train").is_dir() or not (data / "val").is_dir():
            raise UsageError(f"--data {data}: no train/ and val/ folders there; give an image folder with both")
        out = RUNS / data.resolve().name
        budget = parse_time(arguments.budget or "30m", "--budget")
        extra = ["--init", "resnet18", *shlex.split(arguments.train_args)]
    else:
        out = RUNS / "demo"
        data = out / "data"
        budget = parse_time(arguments.budget, "--budget") if arguments.budget else PLANTED_BUDGET
        extra = ["--init", "resnet18", *shlex.split(arguments.train_args)]
        if not (data / "images.csv").is_file():
            from pipeline.data.planted import write_planted

            print(f"writing the embedded set to {data}", flush=True)
            write_planted(data, seed=PLANTED_SEED)
    walk(data, out, budget, extra)
    print(f"\nthe whole road took {(time.monotonic() - started) / 60:.1f} minutes")
    print(f"look at  {(out / 'report.html').resolve()}")
    print(f"serve it: serve run serving.app:build engine={out / 'model.onnx'}")


def walk(data: Path, out: Path, budget: float, train_args: list[str]) -> None:
    """All stages for both presets."""
    for preset, run_folder, share in (("ca", out, CA_SHARE), ("fix", out / "fix", 1 - CA_SHARE)):
        stage(
            f"train {preset}",
            *("pipeline.train", "--preset", preset, "--data", data, "--out", run_folder),
            *("--budget", f"{share * budget:.0f}s", *train_args),
        )
        stage(
            f"judge {preset}",
            *("pipeline.evaluate", "--model", run_folder / "bundle", "--data", data),
            *("--out", run_folder / "metrics.json", "--report", run_folder / "report.html"),
        )
    stage("export", "export.onnx", "--model", out / "bundle", "--out", out / "model.onnx")
    stage("score", "serving.batch", "--engine", out / "model.onnx", "--input", data / "val", "--output", out / "scores")


def stage(title: str, module: str, *arguments: object) -> None:
    """Run one command of the product and show it."""
    command = [module, *(str(argument) for argument in arguments)]
    print(f"\n=== {title}\n$ python -m {shlex.join(command)}", flush=True)
    started = time.monotonic()
    # A cluster of its own: one that happens to run on this machine is somebody else's.
    environment = {"RAY_ADDRESS": "local"} | os.environ
    status = subprocess.run([sys.executable, "-m", *command], check=False, env=environment).returncode
    if status != 0:
        raise WorkError(f"the stage '{title}' ended with status {status}; its own message is above")
    print(f"--- {title}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    run(main, "pipeline.demo")
