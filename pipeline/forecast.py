"""What a training will take, measured on a few images before it starts: ``pipeline.train --dry-run``."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.fills import make_fill
from pipeline.population import Population
from pipeline.settings import configure
from pipeline.step import Batch, JointStep
from pipeline.training import TrainingPlan, build

PROBE = 2
"""Images of the step that is measured; the figures grow in proportion."""
SHARE_OF_PEAK = 0.35
"""Share of a GPU's peak that such convolutional training commonly reaches; an assumption, not a measurement."""
GPUS: dict[str, float] = {"A100 (312 TFLOPS bf16)": 312e12, "H100/H200 (989 TFLOPS bf16)": 989e12}


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A run in numbers."""

    steps: int
    images: int
    """Shown over the whole run, repetitions counted."""
    step_flops: float
    """Of a global step of the joint phase."""
    weight_bytes: int
    """Weights, gradients and optimiser states, on every worker."""
    activation_bytes: float
    """Kept for the backward passes of the global batch in float32; divided by the workers, and halved in bf16."""
    population_bytes: int
    """Earlier classifiers, in the memory of every worker's host."""


def forecast(plan: TrainingPlan) -> Forecast:
    """Take one joint step with two made-up images on this machine's CPU and count.

    ``plan`` needs a length in steps (``--steps`` or ``--epochs``); a length in time is forecast as what fits is not known.
    """
    preset = configure(plan.preset, plan.settings)
    model, _, untrained = build(plan)
    population = None
    if preset.population is not None and preset.classifier == "joint":
        population = Population(config=preset.population, seed=plan.seed)
    probe = replace(plan, batch_size=PROBE)
    step = JointStep(
        model=model,
        preset=preset,
        fill=make_fill(preset.fill, preset.fill_options, mean=plan.mean, std=plan.std),
        blank=torch.zeros(1, 3, plan.input_size, plan.input_size),
        population=None,
        batchnorm=plan.batchnorm,
        trains_classifier=untrained or preset.classifier == "joint",
        scratch=untrained,
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(PROBE, 3, plan.input_size, plan.input_size, generator=generator)
    areas = torch.full((PROBE,), 0.5) if preset.masker.target_area else None
    batch = Batch(images, torch.tensor((plan.class_index * PROBE)[:PROBE]), areas)
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        losses = step.losses(batch, divisor=PROBE, phase="joint", drawn=None, generator=generator)
        step.gradients(losses)
    learning = step.masker_parameters + (step.classifier_parameters if step.joint else [])
    states = {"adam": 2, "sgd": 1}[preset.optimisation.classifier_method]
    masker_bytes = sum(p.nbytes for p in step.masker_parameters)
    classifier_bytes = sum(p.nbytes for p in learning) - masker_bytes
    state_bytes = sum(tensor.nbytes for tensor in model.backbone.state_dict().values())
    return Forecast(
        steps=plan.steps,
        images=plan.steps * plan.batch_size,
        step_flops=counter.get_total_flops() / PROBE * plan.batch_size,
        weight_bytes=state_bytes + masker_bytes * 4 + classifier_bytes * (1 + states),
        activation_bytes=sum(kept.values()) / probe.batch_size * plan.batch_size,
        population_bytes=state_bytes * population.config.size if population is not None else 0,
    )


def describe_forecast(found: Forecast, *, workers: int) -> list[str]:
    """Lines for people."""
    total = found.step_flops * found.steps
    hours = [f"{total / (peak * SHARE_OF_PEAK) / 3600:.3g} h on {name}" for name, peak in GPUS.items()]
    share = found.activation_bytes / workers
    return [
        f"length: {found.steps} steps, {found.images} images shown",
        f"work: {found.step_flops / 1e12:.3g} TFLOP a step, {total / 1e18:.3g} EFLOP in all",
        f"cost: GPU time {', '.join(hours)}, at {SHARE_OF_PEAK:.0%} of the peak (an assumption)",
        f"memory of each of {workers} workers: {found.weight_bytes / 2**30:.2f} GiB of weights, gradients and optimiser states, "
        f"about {share / 2**30:.2f} GiB of activations in fp32 or {share / 2**31:.2f} GiB in bf16, "
        f"{found.population_bytes / 2**30:.2f} GiB of earlier classifiers on the host",
    ]
