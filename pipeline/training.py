"""The training loop that every worker runs; it knows nothing of Ray, so that it can be called anywhere."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import checkpoint, collective
from pipeline.backbone import (
    choose_taps,
    create_classifier,
    pyramid,
    tap_classifier,
)
from pipeline.batchnorm import SyncedBatchNorm2d, synchronise
from pipeline.bundle import load_bundle, save_bundle
from pipeline.clean_cache import CleanCache
from pipeline.data.batches import TrainingBatches, block_order
from pipeline.data.geometry import Geometry, fit
from pipeline.data.images import Images
from pipeline.fills import Colour, make_fill
from pipeline.mask_statistics import mask_statistics, summarise
from pipeline.masker import default_mask_size
from pipeline.model import SaliencyModel, build_masker
from pipeline.objectives import class_weights_of
from pipeline.population import Population
from pipeline.reporting import Reporter
from pipeline.settings import configure, describe
from pipeline.snapshots import Snapshots
from pipeline.spec import BackboneSpec, ModelSpec
from pipeline.step import Batch, JointStep
from pipeline.step_log import StepLog
from pipeline.validation_schedule import ValidationSchedule
from pipeline.weights import load_weights, weights_of

SAMPLES = 256
FIRST_CHECKPOINT = 10.0
"""Seconds of a new run to its first checkpoint at the latest, so that a run that is stopped early has one."""
NOTICE_SECONDS = 5.0
"""Seconds between two looks at whether a machine is about to be taken away; Ray looks as often."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Everything that a worker needs to know; plain values, so that it can be sent and recorded."""

    preset: str
    data: str
    """Root of the data set."""
    paths: Sequence[str]
    """Training images, relative to `data`."""
    labels: Sequence[int]
    """Logit index of each image."""
    data_classes: tuple[str, ...]
    class_index: tuple[int, ...]
    class_names: tuple[str, ...]
    source: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    """File or URI of a state dict, name of hub weights, or none for random weights."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    batchnorm: str
    input_size: int
    geometry: Geometry = "squash"
    steps: int
    """Length of the run in steps; `budget` may end it earlier."""
    budget: float | None = None
    """Length of the run in seconds, over all restarts."""
    batch_size: int
    seed: int = 0
    settings: tuple[str, ...] = ()
    """``SLOT=VALUE`` for each slot of the preset that has another value (`pipeline.settings`)."""
    precision: str = "auto"
    """`fp32`, `bf16`, or `auto`: bf16 where the hardware computes with it."""
    checkpoint_seconds: float = 120.0
    """Seconds between two checkpoints."""
    validate_seconds: float | None = None
    """Seconds between two validations while the masker learns; none: not by the clock."""
    validate_steps: int | None = None
    """Steps between two validations; none: not by steps."""
    threads: int = 1
    """CPU threads of each worker."""

    @property
    def validates(self) -> bool:
        """Whether checkpoints are judged on the way."""
        return self.validate_seconds is not None or self.validate_steps is not None

    def fields(self) -> dict[str, Any]:
        """All fields by name, as they are: `dataclasses.asdict` copies them, and a large listing has no room for that."""
        return {field.name: getattr(self, field.name) for field in dataclass_fields(self)}

    def in_words(self) -> dict[str, Any]:
        """All fields but those that grow with the data set."""
        return {name: value for name, value in self.fields().items() if name not in ("paths", "labels", "class_names")}

    @classmethod
    def of(cls, fields: dict[str, Any]) -> TrainingPlan:
        """A plan from its fields as they come out of JSON or Ray, where tuples may have become lists."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**plain)


def build(plan: TrainingPlan) -> tuple[SaliencyModel, ModelSpec, bool]:
    """A fresh model, its description, and whether its classifier still has to be trained.

    Raises:
        UsageError: the classifier, its weights, its layers or its fill are not as the plan says.
    """
    preset = configure(plan.preset, plan.settings)
    make_fill(preset.fill, preset.fill_options, mean=plan.mean, std=plan.std)
    torch.manual_seed(plan.seed)
    classifier = create_classifier(plan.source, plan.name, outputs=len(plan.class_names), arguments=plan.arguments)
    untrained = plan.weights is None
    if plan.weights is not None:
        state = weights_of(plan.source, plan.name, plan.weights)
        fresh = load_weights(classifier, state, where=f"--weights {plan.weights}")
        untrained = bool(fresh)
        if preset.classifier == "frozen":  # all of it but a head that the weights do not fit
            for parameter_name, parameter in classifier.named_parameters():
                parameter.requires_grad_(parameter_name in fresh)
    maps = pyramid(plan.source, classifier, plan.input_size)
    layers = range(len(maps)) if preset.layers == "all" else None if preset.layers == "deep" else preset.layers
    taps = choose_taps(maps, layers)
    backbone = tap_classifier(plan.source, classifier, taps, last_map=maps[-1].module)
    masker_spec = preset.masker
    mask_size = default_mask_size(plan.input_size)
    masker = build_masker(
        masker_spec, backbone, mask_size=mask_size, classes=len(plan.class_names), norm=SyncedBatchNorm2d
    )
    if plan.batchnorm == "sync":
        synchronise(backbone)
    spec = ModelSpec(
        backbone=BackboneSpec(
            source=plan.source,  # pyright: ignore[reportArgumentType]
            name=plan.name,
            arguments=plan.arguments,
            outputs=len(plan.class_names),
            taps=taps,
            batchnorm=plan.batchnorm,  # pyright: ignore[reportArgumentType]
        ),
        masker=masker_spec,
        preset=plan.preset,
        input_size=plan.input_size,
        mask_size=mask_size,
        geometry=plan.geometry,
        mean=plan.mean,
        std=plan.std,
        class_names=list(plan.class_names),
        data_classes=list(plan.data_classes),
        class_index=list(plan.class_index),
    )
    return SaliencyModel(backbone=backbone, masker=masker), spec, untrained


def train(plan: TrainingPlan, reporter: Reporter, *, resume: Path | None = None, device: str = "cpu") -> None:
    """Train as ``plan`` says; ``resume`` is the folder of an earlier checkpoint of the same plan.

    The last checkpoint holds a folder `bundle`, the trained model.
    """
    torch.set_num_threads(usable_threads(plan.threads))
    preset = configure(plan.preset, plan.settings)
    precision = usable_precision(plan.precision, device)
    model, spec, untrained = build(plan)
    model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    normalise = Normaliser(plan.mean, plan.std, device)
    fill = make_fill(preset.fill, preset.fill_options, mean=plan.mean, std=plan.std)
    blank_image = torch.zeros(1, 3, plan.input_size, plan.input_size, device=device)
    if isinstance(fill, Colour) and preset.fill_sides != "in":  # of the other fills, zero is what holds no picture
        blank_image = fill.content(blank_image, torch.zeros_like(blank_image[:, :1]))
    population = (
        Population(config=preset.population, seed=plan.seed)
        if preset.population and preset.classifier == "joint"
        else None
    )
    step_of = JointStep(
        model=model,
        preset=preset,
        fill=fill,
        blank=blank_image,
        population=population,
        batchnorm=plan.batchnorm,
        trains_classifier=untrained or preset.classifier == "joint",
        autocast=torch.autocast(device, torch.bfloat16) if precision == "bf16" else None,
        scratch=untrained,
        classes=plan.class_index,
        class_weights=class_weights_of(plan.labels, len(plan.class_names)),
        cache=CleanCache(preset.augmentation.views * len(plan.paths)) if preset.augmentation.views else None,
    )
    snapshots = Snapshots(reporter.run) if reporter.run is not None else None
    first, spent, log = 0, 0.0, StepLog()
    if resume is not None:
        first, spent = checkpoint.restore(resume, model, step_of, population, snapshots, log)
    pretraining = preset.pretraining if untrained else 0.0

    def provenance(row: dict[str, Any]) -> dict[str, Any]:
        """What a bundle records of its training at ``row``."""
        return {
            "plan": plan.in_words(),
            "preset": describe(preset),
            "images": len(plan.paths),
            "steps": row["step"],
            "seconds": round(row.get("seconds", spent), 1),
            "workers": collective.world_size(),
            "precision": precision,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "last": {key: round(value, 6) for key, value in row.items() if isinstance(value, float)},
        }

    batches = TrainingBatches(
        root=plan.data,
        paths=plan.paths,
        labels=plan.labels,
        size=plan.input_size,
        geometry=plan.geometry,
        batch_size=plan.batch_size,
        seed=plan.seed,
        augmentation=preset.augmentation,
        rank=collective.rank(),
        world=collective.world_size(),
        threads=max(2, plan.threads),
    )
    started = time.monotonic()
    # Times on the clock that all workers agree on.
    seconds = asked_leaving = spent
    save_at = spent + (plan.checkpoint_seconds if resume else min(FIRST_CHECKPOINT, plan.checkpoint_seconds))
    schedule = ValidationSchedule(seconds=plan.validate_seconds, steps=plan.validate_steps, step=first, spent=spent)
    warned = False
    row: dict[str, Any] = {"step": first, "course": _course(plan, first, spent)}
    stream = batches.iterate(first)
    try:
        while row["course"] < 1:
            asked = time.monotonic()
            step, images, labels, views = next(stream)
            waited = time.monotonic() - asked
            phase, course = _phase(row["course"], pretraining)
            areas = wanted_areas(plan, preset.area_range, step, device) if preset.masker.target_area else None
            logs = step_of(
                Batch(normalise(images), torch.from_numpy(labels).to(device), areas, views if step_of.cache else None),
                step=step,
                divisor=plan.batch_size,
                phase=phase,
                course=course,
                generator=torch.Generator(device).manual_seed(noise_seed(plan.seed, step, collective.rank())),
            )
            now = time.monotonic()
            ask = seconds - asked_leaving >= NOTICE_SECONDS
            asked_leaving = seconds if ask else asked_leaving
            seconds, leaving = _agreed(spent + now - started, ask and reporter.leaving())
            row = {"step": step + 1, "phase": phase, "course": _course(plan, step + 1, seconds), "seconds": seconds}
            row |= logs | {"waiting": waited / max(now - asked, 1e-9)}
            if collective.rank() == 0:  # who writes the checkpoints
                log.add(row)
            reporter.progress(row)
            if row["course"] >= 1:
                break
            validate = False
            if phase == "joint" and schedule.due(step + 1, seconds):
                validate = _agreed(0.0, collective.rank() == 0 and reporter.ready())[1]
                (schedule.asked if validate else schedule.later)(step + 1, seconds)
            # A machine that is about to go gets one checkpoint more, and the run goes on elsewhere from there.
            if seconds >= save_at or validate or (leaving and not warned):
                save_at, warned = seconds + plan.checkpoint_seconds, warned or leaving

                def write(folder: Path, row: dict[str, Any] = row, whole: bool = validate) -> None:
                    checkpoint.save(folder, row, log, model, step_of, population, snapshots)
                    if whole:
                        save_bundle(folder / "bundle", model, spec.model_copy(update={"training": provenance(row)}))

                reporter.checkpoint(write, row, final=False, validate=validate)
    finally:
        stream.close()

    def finish(folder: Path) -> None:
        checkpoint.save(folder, row, log, model, step_of, population, snapshots)
        save_bundle(folder / "bundle", model, spec.model_copy(update={"training": provenance(row)}))
        complete_bundle(folder / "bundle", plan, device=device)

    reporter.checkpoint(finish, row, final=True, validate=plan.validates)


def usable_threads(wanted: int) -> int:
    """At most the processors that this process may run on: more threads than those wait for each other."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(wanted, allowed))


def usable_precision(wanted: str, device: str) -> str:
    """`fp32` or `bf16`; ``auto`` is bf16 on a GPU and on a CPU with instructions for it (twice the speed of fp32 there)."""
    if wanted != "auto":
        return wanted
    native = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "fp32"


class Normaliser:
    """uint8 images (n, S, S, 3) to normalised tensors (n, 3, S, S) on the device, channels last in memory."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: str) -> None:
        self.mean = torch.tensor(mean, device=device)
        self.std = torch.tensor(std, device=device)
        self.device = device

    def __call__(self, images: np.ndarray) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(images)).to(self.device, non_blocking=True)
        return ((x.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)


def wanted_areas(plan: TrainingPlan, area_range: tuple[float, float], step: int, device: str) -> Tensor:
    """The mask areas that this worker's images of ``step`` are to have, (n,): a function of seed, step and place."""
    random = np.random.default_rng([plan.seed, 0xA4EA, step])
    drawn = random.uniform(*area_range, size=plan.batch_size)[collective.rank() :: collective.world_size()]
    return torch.from_numpy(drawn).float().to(device)


def noise_seed(seed: int, step: int, rank: int) -> int:
    """Seed of sampled masks and random fills, which are drawn anew on every worker."""
    return int(np.random.default_rng([seed, 0x4015E, step, rank]).integers(2**63))


def _phase(course: float, pretraining: float) -> tuple[str, float]:
    """What is trained at ``course`` of the run, and how much of that phase is done."""
    if course < pretraining:
        return "classifier", course / pretraining
    return "joint", (course - pretraining) / (1 - pretraining)


def _course(plan: TrainingPlan, step: int, seconds: float) -> float:
    """Share of the run that is done."""
    return max(step / plan.steps, seconds / plan.budget if plan.budget else 0.0)


def _agreed(seconds: float, leaving: bool) -> tuple[float, bool]:
    """Rank 0's clock, and whether any worker's machine is leaving: so that all workers stop and save at the same step."""
    heard = torch.tensor([seconds if collective.rank() == 0 else 0.0, float(leaving)], dtype=torch.float64)
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
        heard = heard.cuda()
    collective.sum_in_place([heard])
    return float(heard[0]), bool(heard[1] > 0)


@torch.no_grad()
def complete_bundle(path: Path, plan: TrainingPlan, *, device: str = "cpu") -> None:
    """Add to a bundle what readers of finished ones expect: training images for calibration and parity, and what their masks are like."""
    bundle = load_bundle(path)
    count = min(SAMPLES, len(plan.paths))
    chosen = np.sort(np.random.default_rng([plan.seed, 0x5A]).choice(len(plan.paths), count, replace=False))
    files = Images(plan.data)
    paths = [plan.paths[int(k)] for k in chosen]
    paths = [paths[k] for k in block_order(paths)]
    images = np.stack([fit(files.image(path), plan.input_size, plan.geometry)[0] for path in paths])
    model, normalise = bundle.model.to(device), Normaliser(plan.mean, plan.std, device)
    masks = [model(normalise(images[k : k + 32]))[1][:, 0].float().cpu().numpy() for k in range(0, count, 32)]
    statistics = summarise(mask_statistics(np.concatenate(masks)))
    save_bundle(path, model, bundle.spec.model_copy(update={"mask_statistics": statistics}), images)
