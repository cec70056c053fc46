"""The joint step with the classifier as it is and rewritten (`pipeline.acceleration`), in turns, in one run.

    python -m tests.benchmarks.step_speed --init timm:mobilenetv2_100 --preset fix --batch-size 16

The plain step in float32 is the oracle; ratios are medians over the rounds.  Before anything is timed the first step of the
fast float32 one must have the same losses (the tests compare every gradient, in float64).  ``--compile`` adds the fast steps
with a classifier that went through `torch.compile`, whose first step says what compiling takes.  For each kind of step: its
multiplications and additions in a second, as a share of what one large product of matrices reaches on this machine in the
same precision.  At the end the last kind is fed from files by the training's own loader, for the share of time that it
waits for data.  ``--least 1.3`` exits with 1 unless the fast float32 step is that much faster than the plain one (``--least-bf16``: the bfloat16
one).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import torch._functorch.config
from torch.utils.flop_counter import FlopCounterMode

from pipeline.backbone import choose_taps, create_classifier, pyramid, tap_classifier
from pipeline.data.batches import TrainingBatches
from pipeline.data.planted import write_planted
from pipeline.data.splits import read_split
from pipeline.fills import Zero
from pipeline.model import SaliencyModel, build_masker
from pipeline.planning import parse_argument, parse_init
from pipeline.presets import PRESETS
from pipeline.spec import MaskerSpec
from pipeline.step import Batch, JointStep
from pipeline.training import Normaliser


def a_model(arguments: argparse.Namespace, device: str) -> SaliencyModel:
    """The classifier with random weights and its masker, in channels-last memory."""
    torch.manual_seed(0)
    source, name = parse_init(arguments.init)
    options = dict(parse_argument(text) for text in arguments.init_arg)
    classifier = create_classifier(source, name, outputs=1000, arguments=options)
    maps = pyramid(source, classifier, arguments.image_size)
    backbone = tap_classifier(source, classifier, choose_taps(maps, None), last_map=maps[-1].module)
    masker = build_masker(MaskerSpec(), backbone, mask_size=arguments.image_size // 4, classes=1000)
    model = SaliencyModel(backbone=backbone, masker=masker).to(device)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


DECODED_BEFORE = 4
"""Batches that the loader may hold ready when the clock starts."""


class Kind(NamedTuple):
    """A form of the step."""

    plain: bool
    precision: str
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"{'plain' if self.plain else 'compiled' if self.compiled else 'fast'} {self.precision}"


def a_step(model: SaliencyModel, arguments: argparse.Namespace, device: str, kind: Kind) -> JointStep:
    """A step of the preset with BatchNorm in eval mode, as for a classifier that brings its weights."""
    # Every step does the same work: none evens out the first masks, none is judged by an earlier classifier.
    preset = replace(PRESETS[arguments.preset], first_masks="published", population=None)
    joint = preset.classifier == "joint"
    step = JointStep(
        model=copy.deepcopy(model),
        preset=preset,
        fill=Zero(),
        blank=torch.zeros(1, 3, arguments.image_size, arguments.image_size, device=device),
        population=None,
        batchnorm="eval",
        trains_classifier=joint,
        autocast=torch.autocast(device, torch.bfloat16) if kind.precision == "bf16" else None,
        scratch=False,
        plain=kind.plain,
    )
    if kind.compiled:
        torch._functorch.config.donated_buffer = False  # both networks' gradients go back through one graph
        step.model.backbone.compile()
    return step


def matrix_peak(device: str, precision: str) -> float:
    """Multiplications and additions a second of one large product of matrices, the best of five."""
    size = 8192 if device == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        torch.matmul(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def waiting(step: JointStep, arguments: argparse.Namespace, device: str) -> float:
    """Share of the time that ``step`` waits for pictures read from files, cropped and mirrored as in training."""
    with TemporaryDirectory() as folder:
        write_planted(Path(folder), seed=0, size=arguments.image_size, per_class_train=32, per_class_val=1)
        split = read_split(folder, "train")
        batches = TrainingBatches(
            root=folder,
            paths=tuple(split.paths),
            labels=tuple(split.labels),
            size=arguments.image_size,
            geometry="squash",
            batch_size=arguments.batch_size,
            seed=0,
            augmentation=PRESETS[arguments.preset].augmentation,
            rank=0,
            world=1,
            threads=max(2, len(os.sched_getaffinity(0))),
        )
        normalise = Normaliser((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), device)
        stream, waited, started = batches.iterate(0), 0.0, 0.0
        try:
            for number in range(DECODED_BEFORE + max(arguments.rounds, 10)):
                asked = time.perf_counter()
                at, images, labels, _ = next(stream)
                if number == DECODED_BEFORE:  # what came before had been read while nobody counted
                    started = time.perf_counter()
                elif number > DECODED_BEFORE:
                    waited += time.perf_counter() - asked
                batch = Batch(normalise(images), torch.from_numpy(labels).to(device))
                step(batch, step=at, divisor=len(labels), phase="joint", course=0.5)
            if device == "cuda":
                torch.cuda.synchronize()
            return waited / (time.perf_counter() - started)
        finally:
            stream.close()


def main() -> None:
    """Measure and print JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--init", default="resnet18")
    p.add_argument("--init-arg", action="append", default=[])
    p.add_argument("--preset", default="fix", choices=sorted(PRESETS))
    p.add_argument("--image-size", type=int, default=224)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--compile", action="store_true", help="also with torch.compile")
    p.add_argument("--least", type=float, help="exit with 1 unless fast fp32 is this much faster than plain fp32")
    p.add_argument("--least-bf16", type=float, help="the same for fast bf16")
    arguments = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    model = a_model(arguments, device)
    x = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size, device=device)
    batch = Batch(x.to(memory_format=torch.channels_last), torch.randint(1000, (len(x),), device=device))
    kinds = [Kind(plain, precision) for precision in ("fp32", "bf16") for plain in (True, False)]
    if arguments.compile:
        kinds += [Kind(plain=False, precision=precision, compiled=True) for precision in ("fp32", "bf16")]
    steps = {kind.name: a_step(model, arguments, device, kind) for kind in kinds}

    def take(step: JointStep, number: int) -> dict[str, float]:
        logs = step(batch, step=number, divisor=len(x), phase="joint", course=0.5)
        if device == "cuda":
            torch.cuda.synchronize()
        return logs

    first, operations, compiling = {}, {}, {}
    for kind in kinds:
        started = time.perf_counter()
        with nullcontext() if kind.compiled else FlopCounterMode(display=False) as counter:
            first[kind.name] = take(steps[kind.name], 0)
        if counter is None:
            compiling[kind.name] = round(time.perf_counter() - started, 1)
        operations[kind.name] = counter.get_total_flops() if counter else operations[f"fast {kind.precision}"]
    for key, wanted in first["plain fp32"].items():
        if abs(first["fast fp32"][key] - wanted) > 1e-4 * max(1.0, abs(wanted)):
            raise SystemExit(f"not the same step: {key} is {first['fast fp32'][key]}, in the plain one {wanted}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = {"fp32": 0.0, "bf16": 0.0}
    for number in range(1, arguments.rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            take(step, number)
            seconds[name].append(time.perf_counter() - started)
        peaks = {name: max(best, matrix_peak(device, name)) for name, best in peaks.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "init": arguments.init, "preset": arguments.preset, "batch": len(x), "size": arguments.image_size, "device": device,
        "ratio to plain fp32": {name: round(medians["plain fp32"] / value, 2) for name, value in medians.items()},
        "share of the matrix peak": {
            kind.name: round(operations[kind.name] / medians[kind.name] / peaks[kind.precision], 3) for kind in kinds
        },
        "masker loss of the first step": {name: round(logs["masker_loss"], 6) for name, logs in first.items()},
        "seconds of the first step": compiling,
    }  # fmt: skip
    result["share of time waiting for data"] = round(waiting(list(steps.values())[-1], arguments, device), 4)
    if device == "cuda":
        result["images per second"] = {name: round(len(x) / value, 1) for name, value in medians.items()}
        result["matrix peak in TFLOP/s"] = {name: round(value / 1e12, 1) for name, value in peaks.items()}
    print(json.dumps(result, indent=1))
    for name, least in (("fast fp32", arguments.least), ("fast bf16", arguments.least_bf16)):
        if least and medians["plain fp32"] / medians[name] < least:
            raise SystemExit(f"{name} is not {least} times as fast as plain fp32")


if __name__ == "__main__":
    main()
