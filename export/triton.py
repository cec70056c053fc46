"""A model folder for NVIDIA Triton, as a by-product: configuration, labels, and the model itself.

A TensorRT plan is served as such; a TensorRT-RTX plan, which Triton does not know, through the graph that it was
compiled from.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from export.files import whole, write_text
from export.manifest import Manifest, Port
from export.verify import compiled_graph

_TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "int64": "TYPE_INT64"}


def write_model_folder(repository: Path, engine: Path, manifest: Manifest) -> Path:
    """Write ``repository``/<name>/{config.pbtxt, labels.txt, 1/model.*}; returns that folder."""
    folder = repository / engine.stem
    plan = manifest.backend == "tensorrt"
    source, target = (engine, "model.plan") if plan else (compiled_graph(engine), "model.onnx")
    with whole(folder / "1" / target, "--triton") as partial:
        shutil.copyfile(source, partial)
    write_text(folder / "labels.txt", "".join(f"{name}\n" for name in manifest.class_names), "--triton")
    write_text(folder / "config.pbtxt", configuration(engine.stem, manifest, plan=plan), "--triton")
    return folder


def configuration(name: str, manifest: Manifest, *, plan: bool) -> str:
    """The text of `config.pbtxt`."""
    most = max(profile.max for profile in manifest.profiles)
    # A plan takes a batch only by a profile that holds it, and Triton uses the first alone unless it is told of the others.
    profiles = ", ".join(f'"{index}"' for index in range(len(manifest.profiles)))
    instance = f"count: 1 kind: KIND_GPU profile: [ {profiles} ]" if plan else "count: 1 kind: KIND_GPU"
    preferred = ", ".join(str(profile.opt) for profile in manifest.profiles)
    lines = [
        f'name: "{name}"',
        f'platform: "{"tensorrt_plan" if plan else "onnxruntime_onnx"}"',
        f"max_batch_size: {most}",
        *_ports("input", manifest.inputs),
        *_ports("output", manifest.outputs),
        f"dynamic_batching {{ preferred_batch_size: [ {preferred} ] max_queue_delay_microseconds: 2000 }}",
        f"instance_group [ {{ {instance} }} ]",
        "model_warmup [ {",
        '  name: "first batch"',
        f"  batch_size: {manifest.profiles[0].opt}",
        f'  inputs {{ key: "image" value {{ data_type: TYPE_UINT8 dims: [ {_dims(manifest.inputs[0])} ] '
        "zero_data: true } }",
        "} ]",
    ]
    return "\n".join(lines) + "\n"


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
