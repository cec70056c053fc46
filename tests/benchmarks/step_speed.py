"""The joint step with the classifier as it is and rewritten (`pipeline.acceleration`), in turns, in one run.

    python -m tests.benchmarks.step_speed --init timm:mobilenetv2_100 --preset fix --batch-size 16

The plain step in float32 is the oracle; ratios are medians over the rounds.  The numbers of one step of both are compared
first, so that a ratio is one of equal results.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time

import torch

from pipeline.backbone import choose_taps, create_classifier, pyramid, tap_classifier
from pipeline.fills import Zero
from pipeline.model import SaliencyModel, build_masker
from pipeline.planning import parse_argument, parse_init
from pipeline.population import Population
from pipeline.presets import PRESETS
from pipeline.spec import MaskerSpec
from pipeline.step import Batch, JointStep


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
    if device == "cuda":
        result["images per second"] = {name: round(len(x) / value, 1) for name, value in medians.items()}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
