"""Training under fire: workers and drivers killed with SIGKILL and a node that goes and comes back, against an undisturbed run.

    python -m tests.benchmarks.training_faults [--kills 20] [--steps 600] [--init resnet18] [--plot faults.png] [--out result.json]

Both runs train `ca` with two workers on the planted-evidence set, one node each.  The disturbed one loses a worker or its
driver at random moments, and once a node, so that it goes on with one worker until the node is back.  Every step is in the
log once, and none that was in a checkpoint is taken again.  The losses are those of the undisturbed run but for the order
of sums over the workers, which one worker takes otherwise than two.  Exits 1 when a step is missing, twice or taken again,
when the losses differ before the node goes or drift apart after it, when fewer kills happened than were asked for, or when
none of them hit a driver or none a worker.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.bundle import load_bundle
from pipeline.checkpoint_index import INDEX_FILE
from pipeline.data.planted import write_planted
from tests.benchmarks.nodes import Nodes, run_measured

KILLS = ("driver", "worker")
DRIVERS = 0.15
"""Share of the kills that hit the driver; one at least."""
SAME = 1e-4
"""Most that the loss of a step may differ while the same workers take the same steps."""
WINDOW = 20
"""Steps over which the difference of the two losses is averaged."""
CLOSE = 0.1
"""Most that the averaged losses may differ, once another number of workers has summed in another order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--init", default="resnet18", help="the classifier (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="give up after so long (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path)
    result = run_measured(parser.parse_args(), measure)
    of_each_kind = all(result["events"].get(kind) for kind in KILLS)
    as_asked = result["kills"] == result["kills_asked"] and of_each_kind and result["resized"]
    before, after = result["largest_gap_before_the_resize"], result["largest_smoothed_gap"]
    lies_on_it = before is not None and before <= SAME and after <= CLOSE
    resumed = result["every_step_once"] and result["no_step_taken_again"]
    sys.exit(0 if resumed and as_asked and lies_on_it else 1)


def measure(flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    data = folder / "data"
    write_planted(data, seed=0, size=64, per_class_train=20, per_class_val=2)
    with Nodes("RayTrainWorker") as nodes:
        started = time.time()
        job = start(flags, data, folder / "whole", nodes)
        assert job.wait() == 0, "the undisturbed run failed"
        undisturbed = time.time() - started
        events, kept, starts = disturb(flags, data, folder / "out", nodes)
    one, two = read_log(folder / "whole"), read_log(folder / "out")
    a, b = load_bundle(folder / "whole" / "bundle"), load_bundle(folder / "out" / "bundle")
    final = (folder / "out" / "log.csv").read_text().splitlines()
    weights = [
        float((value.double() - b.model.state_dict()[name].double()).abs().max())
        for name, value in a.model.state_dict().items()
    ]
    difference = np.array([one[s]["clean_loss"] for s in sorted(one)]) - [two[s]["clean_loss"] for s in sorted(two)]
    gap, smoothed = np.abs(difference), np.convolve(difference, np.full(WINDOW, 1 / WINDOW), "valid")
    if flags.plot:
        plot(one, two, events, flags.plot)
    return {
        "steps": flags.steps,
        "every_step_once": sorted(two) == list(range(1, flags.steps + 1)) == sorted(one),
        "no_step_taken_again": any(kept) and all(final[: len(lines)] == lines for lines in kept),
        "events": dict(Counter(kind for _, kind in events)),
        "kills": sum(kind in KILLS for _, kind in events),
        "kills_asked": flags.kills,
        "resized": {"node lost", "node back"} <= {kind for _, kind in events},
        "starts_of_the_command": starts,
        "largest_gap_of_clean_loss": float(gap.max()),
        "largest_gap_before_the_resize": float(gap[: first_resize(events)].max()) if first_resize(events) else None,
        "largest_smoothed_gap": float(np.abs(smoothed).max()),
        "loss_at_the_start": one[1]["clean_loss"],
        "largest_gap_of_weights": max(weights),
        "seconds_undisturbed": round(undisturbed, 1),
        "seconds_disturbed": round(time.time() - started - undisturbed, 1),
    }


def start(flags: argparse.Namespace, data: Path, out: Path, nodes: Nodes) -> subprocess.Popen:
    command = [sys.executable, "-m", "pipeline.train", "--preset", "ca", "--data", str(data), "--out", str(out)]
    command += ["--init", flags.init, "--batch-size", "16", "--steps", str(flags.steps), "--workers", "1:2"]
    command += ["--checkpoint-every", "2s", "--precision", "fp32"]
    environment = os.environ | {"RAY_ADDRESS": nodes.address, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)


def disturb(
    flags: argparse.Namespace, data: Path, out: Path, nodes: Nodes
) -> tuple[list[tuple[int, str]], list[list[str]], int]:
    """Run until the end, killing something at random moments.

    Returns what happened, each time with the step of the newest checkpoint; the log that the run had to go on from, each
    time; and how often the command was started.
    """
    chance = random.Random(flags.seed)
    drivers = max(1, round(DRIVERS * flags.kills))
    kinds = ["driver"] * drivers + ["worker"] * (flags.kills - drivers)
    chance.shuffle(kinds)
    events: list[tuple[int, str]] = []
    kept: list[list[str]] = []
    starts = 0
    resize_at, back_at = flags.steps // 3, flags.steps // 2
    shrunk = grown = False
    deadline = time.monotonic() + 60 * flags.minutes
    while True:
        job = start(flags, data, out, nodes)
        starts += 1
        while job.poll() is None:
            time.sleep(0.2)
            if time.monotonic() > deadline:
                os.killpg(job.pid, signal.SIGKILL)
                raise RuntimeError(f"not done after {flags.minutes:g} minutes; so far: {events}")
            step = newest(out)
            kills = sum(kind in KILLS for _, kind in events)
            if step >= resize_at and not shrunk:
                shrunk = True
                nodes.shrink()
                events.append((step, "node lost"))
            elif step >= back_at and shrunk and not grown:
                grown = True
                nodes.grow()
                events.append((step, "node back"))
            elif kills < flags.kills and step >= flags.steps * (kills + 0.5) / (flags.kills + 1):
                time.sleep(3 * chance.random())
                if kinds[kills] == "driver":
                    os.killpg(job.pid, signal.SIGKILL)
                    job.wait()
                    events.append((step, "driver"))
                elif nodes.kill_worker(chance):
                    events.append((step, "worker"))
                else:
                    continue
            else:
                continue
            kept.append(committed(out))
            print(f"{len(events)}: {events[-1][1]} at step {step}", file=sys.stderr, flush=True)
        if job.returncode == 0:
            return events, kept, starts
        if job.returncode == 2:
            raise RuntimeError("the command was refused; see its message above")
        time.sleep(1)


def newest(out: Path) -> int:
    """Step of the newest whole checkpoint, by its log; 0 before the first."""
    steps = [0]
    for log in out.glob("checkpoints/checkpoint_*/log.csv"):
        try:
            steps.append(len(log.read_text().splitlines()) - 1)
        except OSError:
            continue
    return max(steps)


def committed(out: Path) -> list[str]:
    """The log of the checkpoint that Ray lists as the latest; empty while the list is being written."""
    try:
        index = json.loads((out / "checkpoints" / INDEX_FILE).read_text())
        name = index["latest_checkpoint_result"]["checkpoint_dir_name"]
        return (out / "checkpoints" / name / "log.csv").read_text().splitlines()
    except (OSError, ValueError, TypeError):
        return []


def first_resize(events: list[tuple[int, str]]) -> int | None:
    return next((step for step, kind in events if kind == "node lost"), None)


def read_log(run: Path) -> dict[int, dict[str, float]]:
    with (run / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["step"] for row in rows}) == len(rows), "a step is in the log twice"
    return {int(row["step"]): {k: float(v) for k, v in row.items() if v and k not in ("phase", "step")} for row in rows}


def plot(one: dict[int, Any], two: dict[int, Any], events: list[tuple[int, str]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(10, 7), sharex=True, layout="constrained")
    for axis, name, title in ((axes[0], "clean_loss", "loss on whole pictures"), (axes[1], "mask_mean", "mean mask")):
        for log, label, style in (
            (one, "undisturbed", {"linewidth": 4, "color": "0.75"}),
            (two, "disturbed", {"linewidth": 1, "color": "C0"}),
        ):
            steps = [step for step in sorted(log) if name in log[step]]
            axis.plot(steps, [log[step][name] for step in steps], label=label, **style)
        axis.set_ylabel(title)
    colours = {"worker": "C3", "driver": "C1", "node lost": "black", "node back": "C2"}
    for kind, colour in colours.items():
        for k, step in enumerate([s for s, what in events if what == kind]):
            for axis in axes:
                label = f"{kind} killed" if kind in ("worker", "driver") else kind
                axis.axvline(step, color=colour, linestyle=":", label=label if k == 0 else None)
    axes[1].set_xlabel("step")
    axes[0].legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
