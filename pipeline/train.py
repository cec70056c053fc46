"""Train a classifier's masker, or both together, on Ray Train.

    python -m pipeline.train --preset ca --data DIR --out RUN
    ray job submit -- python -m pipeline.train --preset fix --data DIR --out RUN --init resnet50 --weights my.pt

``RUN/bundle`` is the trained model, ``RUN/log.csv`` the course of the training once it has ended.  The same command run again goes on where
it was stopped.  A run of `fix` on 10 classes and 224 pixels with an ImageNet classifier takes half an hour on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from pipeline.allocator import keep_freed_memory
from pipeline.cli import Parser, run
from pipeline.errors import UsageError, WorkError


def parser() -> Parser:
    """The command line."""
    from pipeline.fills import FILLS
    from pipeline.presets import PRESETS
    from pipeline.recipes import RECIPES
    from pipeline.validation import HIGHER_IS_BETTER, LOWER_IS_BETTER

    presets = "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())
    p = Parser("pipeline.train", "Train a masker with its classifier on Ray Train; running it again resumes.")
    p.add_argument("--preset", choices=sorted(PRESETS), default="fix", help=f"the method. {presets} (default fix)")
    p.add_argument(
        "--recipe",
        choices=sorted(RECIPES),
        help="the paper's own run: preset, network, weights, passes, size and geometry at once; other flags still count",
    )
    p.add_argument(
        "--data", required=True, metavar="DIR", help="folder or URI with train/<class>/*, or with tar or Parquet shards"
    )
    p.add_argument("--out", required=True, metavar="RUN", help="folder or URI of the run; RUN/bundle is the result")
    p.add_argument(
        "--init", default="resnet50", metavar="NAME", help="torchvision name, or timm:NAME (default resnet50)"
    )
    p.add_argument("--init-arg", action="append", default=[], metavar="K=V", help="argument of the model; repeatable")
    p.add_argument(
        "--weights",
        metavar="FILE",
        help="state dict (a file or a URI), or the name of hub weights such as DEFAULT; without it the classifier is trained "
        "from random weights first",
    )
    p.add_argument("--mean", metavar="R,G,B", help="input mean on the scale 0..1 (default: the model's own)")
    p.add_argument(
        "--std", metavar="R,G,B", help="input standard deviation on the scale 0..1 (default: the model's own)"
    )
    p.add_argument(
        "--batchnorm",
        choices=("eval", "train", "sync"),
        help="the classifier's BatchNorm: frozen statistics, each worker's own, or all workers' (default: eval with --weights, else sync)",
    )
    p.add_argument(
        "--class-map",
        metavar="CSV",
        help="columns folder,index: maps folders to the classifier's outputs; without it a head of the right size is trained",
    )
    p.add_argument(
        "--class-names",
        metavar="FILE",
        help="names of the classifier's outputs: JSON list or object by index, or one a line",
    )
    p.add_argument("--per-class", type=int, metavar="N", help="use N training images of each class")
    p.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the network's input (default: 224, or less for smaller pictures)",
    )
    p.add_argument(
        "--geometry",
        choices=("squash", "crop"),
        default="squash",
        help="whole picture squashed to the square, or its centre (default squash)",
    )
    p.add_argument(
        "--layers",
        metavar="I,J",
        help="layers that the masker reads, 0 the finest; or all, or deep: maps of 4 to 16 cells (default: the preset's)",
    )
    p.add_argument("--fill", metavar="NAME", help=f"what takes the place of hidden pixels: {', '.join(FILLS)}")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SLOT=VALUE",
        help="another value for a slot of the preset, such as mask_in=none, classifier=frozen, masker.class_conditional=true, "
        "masker.concrete.mode=hard, fill_options.sigma=10, population.inert=true; repeatable",
    )
    p.add_argument(
        "--size-target",
        type=float,
        metavar="SHARE",
        help="share of a blank picture's uncertainty that the masked-out picture keeps (default: the preset's)",
    )
    p.add_argument(
        "--batch-size", type=int, metavar="N", help="images per step over all workers (default: the preset's)"
    )
    p.add_argument("--epochs", type=float, default=20, help="passes over the training images (default 20)")
    p.add_argument("--steps", type=int, help="length in steps, instead of --epochs")
    p.add_argument(
        "--budget",
        metavar="TIME",
        help="end after this time at the latest: 90s, 30m, 2h; the schedule fits itself to it",
    )
    p.add_argument(
        "--workers", default="1", metavar="N|MIN:MAX", help="training workers; a range is elastic (default 1)"
    )
    p.add_argument(
        "--cpus-per-worker",
        type=int,
        metavar="N",
        help="CPUs of each worker (default: as many as let all fit on the machines that are there at the start); with --gpu "
        "yes or no, too, the machines may still have to be started by an autoscaler",
    )
    p.add_argument(
        "--gpu",
        choices=("auto", "yes", "no"),
        default="auto",
        help="one GPU per worker (default: if the cluster has any)",
    )
    p.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="arithmetic of the networks (auto: bf16 where the hardware computes with it)",
    )
    p.add_argument("--checkpoint-every", default="2m", metavar="TIME", help="time between checkpoints (default 2m)")
    p.add_argument(
        "--validate-every",
        metavar="TIME|epoch",
        help="judge the masker on val/ this often, or after every pass over the data, beside the training; figures go to "
        "RUN/validation.csv (default: never)",
    )
    p.add_argument(
        "--validation-images",
        type=int,
        default=500,
        metavar="N",
        help="pictures of val/ for each (default %(default)s)",
    )
    p.add_argument(
        "--select",
        choices=(*LOWER_IS_BETTER, *HIGHER_IS_BETTER),
        help="keep the validated checkpoint that is best by this figure, instead of the last one",
    )
    p.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")
    p.add_argument("--dry-run", action="store_true", help="say what the run takes and what it should reach, and end")
    return p


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line with its recipe's values in place of the defaults."""
    from pipeline.recipes import RECIPES, apply_recipe

    p = parser()
    arguments = p.parse_args(argv)
    if arguments.recipe:
        p.set_defaults(**RECIPES[arguments.recipe].defaults())
        arguments = p.parse_args(argv)
        apply_recipe(arguments)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Train as ``argv`` says.

    Raises:
        UsageError: an argument, the data or the weights are not usable.
        WorkError: the training failed.
    """
    arguments = parse(argv)
    keep_freed_memory()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    from pipeline.planning import plan_training

    workers = parse_workers(arguments.workers)
    plan = plan_training(arguments)
    most = workers if isinstance(workers, int) else workers[1]
    if most > plan.batch_size:
        raise UsageError(
            f"--workers {arguments.workers}: more than the {plan.batch_size} pictures of a step; raise --batch-size or lower --workers"
        )
    print(describe(plan), flush=True)
    if arguments.dry_run:
        show_forecast(plan, recipe=arguments.recipe, workers=workers if isinstance(workers, int) else workers[0])
        return
    from pipeline.ray_training import fit

    bundle = fit(
        plan,
        out=arguments.out,
        workers=workers,
        gpu=arguments.gpu,
        cpus_per_worker=arguments.cpus_per_worker,
        validation_images=arguments.validation_images,
        select=arguments.select,
    )
    print(f"model bundle: {bundle}")


def show_forecast(plan: Any, *, recipe: str | None, workers: int) -> None:
    """Print what ``plan`` takes.

    Raises:
        UsageError: the length of the run is a time.
    """
    from pipeline.forecast import describe_forecast, forecast
    from pipeline.recipes import RECIPES

    if plan.budget:
        raise UsageError(
            "--dry-run: how many steps fit into --budget is only known to the machine; give --epochs or --steps"
        )
    for line in describe_forecast(forecast(plan), workers=workers):
        print(line)
    if recipe:
        print(f"expected: {RECIPES[recipe].expected}")


def describe(plan: Any) -> str:
    """One line on what is about to be trained."""
    length = f"at most {plan.budget:.0f} s" if plan.budget else f"{plan.steps} steps"
    return (
        f"training '{plan.preset}' on {len(plan.paths)} images of {len(plan.data_classes)} classes: {plan.source}:{plan.name}, "
        f"{plan.input_size} pixels, batch {plan.batch_size}, {length}, seed {plan.seed}"
    )


def parse_workers(text: str) -> int | tuple[int, int]:
    """``4`` or ``1:4``.

    Raises:
        UsageError: neither.
    """
    try:
        numbers = [int(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) == 1 and numbers[0] >= 1:
        return numbers[0]
    if len(numbers) == 2 and 1 <= numbers[0] <= numbers[1]:
        return numbers[0], numbers[1]
    raise UsageError(f"--workers {text}: give a number such as 4, or a range such as 1:4")


__all__ = ["UsageError", "WorkError", "main", "parse", "parse_workers", "parser"]

if __name__ == "__main__":
    run(main, "pipeline.train")
