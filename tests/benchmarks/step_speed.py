"""The joint step with the classifier as it is and rewritten (`pipeline.acceleration`), in turns, in one run.

    python -m tests.benchmarks.step_speed --init timm:mobilenetv2_100 --preset fix --batch-size 16

The plain step in float32 is the oracle; ratios are medians over the rounds.  Before anything is timed the first step of the
fast float32 one must have the same losses (the tests compare every gradient, in float64).  At the end the fastest step is
fed from files by the training's own loader, for the share of time that it waits for data.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from pipeline.backbone import choose_taps, create_classifier, pyramid, tap_classifier
from pipeline.data.batches import TrainingBatches
from pipeline.data.planted import write_planted
from pipeline.data.splits import read_split
from pipeline.fills import Zero
from pipeline.model import SaliencyModel, build_masker
from pipeline.planning import parse_argument, parse_init
from pipeline.population import Population
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


def a_step(
    model: SaliencyModel, arguments: argparse.Namespace, device: str, *, plain: bool, precision: str
) -> JointStep:
    """A step of the preset with BatchNorm in eval mode, as for a classifier that brings its weights."""
    preset = PRESETS[arguments.preset]
    joint = preset.classifier == "joint"
    return JointStep(
        model=copy.deepcopy(model),
        preset=preset,
        fill=Zero(),
        blank=torch.zeros(1, 3, arguments.image_size, arguments.image_size, device=device),
        population=Population(config=preset.population, seed=0) if preset.population and joint else None,
        batchnorm="eval",
        trains_classifier=joint,
        autocast=torch.autocast(device, torch.bfloat16) if precision == "bf16" else None,
        scratch=False,
        plain=plain,
    )


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
            for number in range(arguments.rounds + 1):
                asked = time.perf_counter()
                at, images, labels, _ = next(stream)
                if number == 0:  # the first batch is waited for by everybody
                    started = time.perf_counter()
                else:
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
    arguments = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = a_model(arguments, device)
    x = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size, device=device)
    batch = Batch(x.to(memory_format=torch.channels_last), torch.randint(1000, (len(x),), device=device))
    kinds = [(plain, precision) for precision in ("fp32", "bf16") for plain in (True, False)]
    names = [f"{'plain' if plain else 'fast'} {precision}" for plain, precision in kinds]
    steps = [a_step(model, arguments, device, plain=plain, precision=precision) for plain, precision in kinds]

    def take(step: JointStep, number: int) -> dict[str, float]:
        logs = step(batch, step=number, divisor=len(x), phase="joint", course=0.5)
        if device == "cuda":
            torch.cuda.synchronize()
        return logs

    first = {name: take(step, 0) for name, step in zip(names, steps, strict=True)}
    for key, wanted in first["plain fp32"].items():
        if abs(first["fast fp32"][key] - wanted) > 1e-4 * max(1.0, abs(wanted)):
            raise SystemExit(f"not the same step: {key} is {first['fast fp32'][key]}, in the plain one {wanted}")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(1, arguments.rounds + 1):
        for name, step in zip(names, steps, strict=True):
            started = time.perf_counter()
            take(step, number)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "init": arguments.init, "preset": arguments.preset, "batch": len(x), "size": arguments.image_size, "device": device,
        "ratio to plain fp32": {name: round(medians["plain fp32"] / value, 2) for name, value in medians.items()},
        "masker loss of the first step": {name: round(logs["masker_loss"], 6) for name, logs in first.items()},
    }  # fmt: skip
    result["share of time waiting for data"] = round(waiting(steps[-1], arguments, device), 4)
    if device == "cuda":
        result["images per second"] = {name: round(len(x) / value, 1) for name, value in medians.items()}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
