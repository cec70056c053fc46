"""From an ONNX graph to a TensorRT plan: one strongly typed path for every backend."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from export.backend import Backend, last_errors, native
from export.gpu import gpus
from export.manifest import Profile
from pipeline.errors import UsageError, WorkError

HardwareCompatibility = Literal["none", "same_cc", "ampere+"]
_CAPABILITY = re.compile(r"[1-9]\d*\.\d")
_TAIL = 1 << 20
_COMPATIBILITY = {"same_cc": "SAME_COMPUTE_CAPABILITY", "ampere+": "AMPERE_PLUS"}


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """How a plan is built."""

    profiles: tuple[Profile, ...]
    """Batch sizes; one optimisation profile each."""
    workspace: int | None = None
    """Most scratch memory on the GPU, in MiB; none: all that is free."""
    opt_level: int | None = None
    """0 (quick) to 5 (all tactics); none: the backend's default."""
    timing_cache: Path | None = None
    """File of measured tactics, read and extended (TensorRT; TensorRT-RTX measures on the running GPU instead)."""
    version_compatible: bool = False
    """The plan also runs on later versions of TensorRT, more slowly."""
    hardware_compatibility: HardwareCompatibility = "none"
    """TensorRT: on which other GPUs the plan runs."""
    compute_capabilities: tuple[str, ...] = ()
    """TensorRT-RTX: GPUs that the plan is for, such as `8.9`; none: all that the backend takes by default."""
    refit: bool = False
    """Weights can be exchanged without a new build."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A plan."""

    plan: bytes
    seconds: float
    layers: int
    notes: tuple[str, ...]


def parse_profile(text: str) -> Profile:
    """``1,64,256`` (min,opt,max), ``64,256`` (opt,max; min 1) or ``8`` (that batch alone)."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers *= 3
    elif len(numbers) == 2:
        numbers = [1, *numbers]
    if len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
        raise UsageError(f"--batch {text}: give min,opt,max with 1 <= min <= opt <= max, such as 1,64,256")
    return Profile(min=numbers[0], opt=numbers[1], max=numbers[2])


def check_config(config: BuildConfig, backend: Backend) -> None:
    """Refuse what this backend cannot do, before any long work.

    Raises:
        UsageError: names the flag and what to do instead.
    """
    rtx = backend.name == "tensorrt-rtx"
    if rtx and config.hardware_compatibility != "none":
        raise UsageError(
            "--hardware-compat is TensorRT's; tensorrt-rtx plans name their GPUs: use --compute-capability 8.6,8.9"
        )
    if rtx and config.version_compatible:
        raise UsageError("--version-compatible is TensorRT's; a tensorrt-rtx plan needs the version that built it")
    if not rtx and config.compute_capabilities:
        raise UsageError("--compute-capability is tensorrt-rtx's; for TensorRT use --hardware-compat")
    for wanted in config.compute_capabilities:
        if not _CAPABILITY.fullmatch(wanted):  # 86 would build, and its plan would never be found to fit 8.6
            raise UsageError(f"--compute-capability {wanted}: write it with its dot, such as 8.6,8.9")
        if not hasattr(backend.trt.ComputeCapability, _member(wanted)):
            known = [name[2:] for name in dir(backend.trt.ComputeCapability) if name.startswith("SM")]
            there = ", ".join(f"{name[:-1]}.{name[-1]}" for name in sorted(known, key=int))
            raise UsageError(f"--compute-capability {wanted}: {backend.name} {backend.version} builds for {there}")
    if rtx and config.refit and not gpus():
        raise UsageError(
            "--refit: tensorrt-rtx builds refittable plans where there is a GPU only; build there, or leave it out"
        )
    if config.opt_level is not None and not 0 <= config.opt_level <= 5:
        raise UsageError(f"--opt-level {config.opt_level}: use 0 to 5")
    if config.workspace is not None and config.workspace < 1:
        raise UsageError(f"--workspace {config.workspace}: use a size in MiB")
    if not rtx and not gpus():
        raise UsageError(
            "tensorrt builds on the GPU that it is for, and this machine shows none; use --backend tensorrt-rtx, "
            "or a machine with a GPU"
        )


def build(graph: bytes, backend: Backend, config: BuildConfig) -> Built:
    """Compile an ONNX graph (its bytes).

    Raises:
        UsageError: the parser refuses the graph, it takes images of any size, or CUDA does not start.
        WorkError: the builder fails.
    """
    trt = backend.trt
    started = time.perf_counter()
    builder = native(backend, "Builder")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, backend.log)
    if not parser.parse(graph):
        first = " ".join(parser.get_error(0).desc().split())[:300] if parser.num_errors else last_errors(backend)
        raise UsageError(
            f"{backend.name} {backend.version} refuses the graph: {first}; 'polygraphy inspect capability' on the "
            "graph tells more"
        )
    image = network.get_input(0)
    fixed = tuple(image.shape)[1:]
    if any(size < 1 for size in fixed):
        raise UsageError(f"the graph takes images of any size, but a plan is built for one; {_other_export(graph)}")
    settings = builder.create_builder_config()
    notes = _configure(settings, backend, config)
    for profile in config.profiles:
        shapes = builder.create_optimization_profile()
        shapes.set_shape(image.name, *((batch, *fixed) for batch in (profile.min, profile.opt, profile.max)))
        settings.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, settings)
    if plan is None:
        raise WorkError(f"{backend.name} {backend.version} cannot build the engine: {last_errors(backend)}")
    if config.timing_cache is not None and settings.get_timing_cache() is not None:
        from export.files import write_bytes

        write_bytes(config.timing_cache, bytes(settings.get_timing_cache().serialize()), "--timing-cache")
    return Built(plan=bytes(plan), seconds=time.perf_counter() - started, layers=network.num_layers, notes=tuple(notes))


def _configure(settings: Any, backend: Backend, config: BuildConfig) -> list[str]:
    """Apply ``config``; returns what has to be said about it."""
    trt = backend.trt
    notes = []
    if hasattr(trt.BuilderFlag, "TF32"):  # set by default: a GPU would multiply float32 with 10 bits of mantissa
        settings.clear_flag(trt.BuilderFlag.TF32)
    if config.workspace is not None:
        settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace << 20)
    if config.opt_level is not None:
        settings.builder_optimization_level = config.opt_level
    if config.version_compatible:
        settings.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if config.refit:
        settings.set_flag(trt.BuilderFlag.REFIT)
    if config.hardware_compatibility != "none":
        level = _COMPATIBILITY[config.hardware_compatibility]
        settings.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if config.compute_capabilities:
        settings.num_compute_capabilities = len(config.compute_capabilities)
        for place, wanted in enumerate(config.compute_capabilities):
            settings.set_compute_capability(getattr(trt.ComputeCapability, _member(wanted)), place)
    if config.timing_cache is not None:
        if backend.name == "tensorrt-rtx":
            notes.append("tensorrt-rtx has no timing cache: it chooses kernels on the GPU that runs the plan")
        else:
            known = config.timing_cache.read_bytes() if config.timing_cache.is_file() else b""
            cache = settings.create_timing_cache(known)
            if cache is None or not settings.set_timing_cache(cache, ignore_mismatch=False):
                raise UsageError(f"--timing-cache {config.timing_cache} is none, or another version's; give a new file")
    return notes


def _other_export(graph: bytes) -> str:
    """How to export a graph of one image size instead; the manifest, which tells, stands at the graph's end."""
    dynamic = b'"dynamic_size":true' in graph[-_TAIL:]
    return f"export it without {'--dynamic-size' if dynamic else '--resize'}"


def _member(compute_capability: str) -> str:
    return "SM" + compute_capability.replace(".", "")


def batch_sizes_of(profiles: Sequence[Profile]) -> list[int]:
    """Every batch size that the profiles name."""
    return sorted({size for profile in profiles for size in (profile.min, profile.opt, profile.max)})
