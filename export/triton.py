"""A model folder for NVIDIA Triton, as a by-product: configuration, labels, and the model itself.

A TensorRT plan is served as such; a TensorRT-RTX plan, which Triton does not know, through the graph that it was
compiled from.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from export.manifest import Manifest, Port, Profile, manifest_path
from export.verify import compiled_graph
from pipeline.errors import UsageError

_TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "int64": "TYPE_INT64"}
_OURS = {"config.pbtxt", "labels.txt", "1", "1/model.onnx", "1/model.plan", "1/model.plan.json"}
_STAGING = ".partial-"
_DISABLE_ALL = 2
"""Of the levels that Triton's ONNX Runtime backend knows; its README lists them."""


def check_profiles(profiles: Sequence[Profile]) -> None:
    """Make sure that some profile of a plan takes each batch up to the largest: Triton fills none up, `PlanEngine` does.

    Raises:
        UsageError: there is a gap.
    """
    most = max(profile.max for profile in profiles)
    gap = [k for k in range(1, most + 1) if not any(profile.min <= k <= profile.max for profile in profiles)]
    if gap:
        raise UsageError(
            f"--triton: no profile takes a batch of {gap[0]}, and Triton fills batches up for none; build with --batch "
            f"from 1 up and without gaps, such as --batch 1,{profiles[0].opt},{most}"
        )


def check_folder(folder: Path) -> None:
    """Make sure that nothing but what an earlier export wrote is in a model's folder.

    Raises:
        UsageError: something else is.
    """
    inside = [path.relative_to(folder) for path in folder.rglob("*")]
    strangers = sorted({str(path) for path in inside if not path.parts[0].startswith(_STAGING)} - _OURS)
    if strangers:
        raise UsageError(
            f"--triton: {folder} holds {strangers[0]}, which is none of ours; move it, or give another folder"
        )


def write_model_folder(repository: Path, engine: Path, manifest: Manifest) -> Path:
    """Write ``repository``/<name>/{config.pbtxt, labels.txt, 1/model.*}, all of it or nothing; returns that folder.

    Raises:
        UsageError: the folder cannot be written or holds something else, or Triton could not serve the plan's profiles.
    """
    folder = repository / engine.stem
    plan = manifest.backend == "tensorrt"
    if plan:
        check_profiles(manifest.profiles)
    check_folder(folder)
    new = not folder.exists()
    # Within the folder: a server that looks for models takes any folder beside it for one, and in it numbers alone.
    partial = folder / f"{_STAGING}{uuid.uuid4().hex[:8]}"
    model = partial / "1" / ("model.plan" if plan else "model.onnx")
    try:
        for left in folder.glob(f"{_STAGING}*"):  # by an export that was killed
            shutil.rmtree(left)
        model.parent.mkdir(parents=True)
        shutil.copyfile(engine if plan else compiled_graph(engine), model)
        if plan:
            # Not for Triton: for export.doctor, and for whoever wonders what the plan is.
            manifest_path(model).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (partial / "labels.txt").write_text("".join(f"{name}\n" for name in manifest.class_names), encoding="utf-8")
        (partial / "config.pbtxt").write_text(configuration(engine.stem, manifest, plan=plan), encoding="utf-8")
        _put(partial, folder)
    except OSError as error:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise UsageError(
            f"cannot write {folder}: {error.strerror or error}; give --triton a writable place with enough room"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _put(partial: Path, folder: Path) -> None:
    """Bring what is in ``partial`` to its places in ``folder``, the configuration last."""
    version, before = folder / "1", partial / "before"
    if version.exists():
        version.rename(before)
    try:
        (partial / "1").rename(version)
    except OSError:
        if before.exists():
            before.rename(version)
        raise
    for name in ("labels.txt", "config.pbtxt"):
        (partial / name).replace(folder / name)


def configuration(name: str, manifest: Manifest, *, plan: bool) -> str:
    """The text of `config.pbtxt`."""
    most = max(profile.max for profile in manifest.profiles)
    # A plan takes a batch only by a profile that holds it, and Triton uses the first alone unless it is told of the others.
    profiles = ", ".join(f'"{index}"' for index in range(len(manifest.profiles)))
    instance = f"count: 1 kind: KIND_GPU profile: [ {profiles} ]" if plan else "count: 1 kind: KIND_GPU"
    preferred = ", ".join(str(size) for size in sorted({profile.opt for profile in manifest.profiles}))
    lines = [
        f'name: "{name}"',
        f'platform: "{"tensorrt_plan" if plan else "onnxruntime_onnx"}"',
        f"max_batch_size: {most}",
        *_ports("input", manifest.inputs),
        *_ports("output", manifest.outputs),
        f"dynamic_batching {{ preferred_batch_size: [ {preferred} ] max_queue_delay_microseconds: 2000 }}",
        f"instance_group [ {{ {instance} }} ]",
        *([] if plan else _as_in_session(manifest)),
        "model_warmup [ {",
        '  name: "first batch"',
        f"  batch_size: {manifest.profiles[0].opt}",
        f'  inputs {{ key: "image" value {{ data_type: TYPE_UINT8 dims: [ {_dims(manifest.inputs[0])} ] '
        "zero_data: true } }",
        "} ]",
    ]
    return "\n".join(lines) + "\n"


def _as_in_session(manifest: Manifest) -> list[str]:
    """What `export.session` asks of ONNX Runtime so that masks are right, in Triton's words."""
    # One optimiser alone, as for int8 in a session, cannot be disabled there: so none runs.
    level = [f"  graph {{ level: {_DISABLE_ALL} }}"] if manifest.precision in ("int8", "fp8") else []
    cuda = 'name: "cuda" parameters { key: "use_tf32" value: "0" }'
    return [
        "optimization {", *level, f"  execution_accelerators {{ gpu_execution_accelerator [ {{ {cuda} }} ] }}", "}",
    ]  # fmt: skip


def _ports(kind: str, ports: list[Port]) -> list[str]:
    lines = []
    for port in ports:
        labels = ' label_filename: "labels.txt"' if port.name == "logits" else ""
        lines.append(
            f'{kind} [ {{ name: "{port.name}" data_type: {_TYPES[port.dtype]} dims: [ {_dims(port)} ]{labels} }} ]'
        )
    return lines


def _dims(port: Port) -> str:
    """Dimensions without the batch, which Triton adds."""
    return ", ".join(str(size) if isinstance(size, int) else "-1" for size in port.shape[1:])
