"""What an engine says of itself, so that nothing is loaded where it does not fit.

An ONNX file carries its manifest in `metadata_props` under the key `onepass`; a TensorRT plan has it beside itself as
`<engine>.json`, because a plan with anything in front of its bytes is one that other tools cannot read.
"""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from export.files import write_text
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from export.graph import GraphConfig
    from pipeline.spec import ModelSpec

METADATA_KEY = "onepass"
FORMAT = "onepass-engine/1"

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Port(_Record):
    """One input or output of the graph."""

    name: str
    dtype: str
    """NumPy's name: `uint8`, `float32`, `int64`."""
    shape: list[int | str]
    """A name stands for a dynamic dimension."""


class Profile(_Record):
    """The batch sizes that one optimisation profile of a TensorRT engine serves."""

    min: int = Field(ge=1)
    opt: int = Field(ge=1)
    max: int = Field(ge=1)


class Calibration(_Record):
    """The images that the ranges of a quantised graph were measured on."""

    source: str
    images: int
    sha256: str
    """Of the fitted uint8 pixels, in order."""
    method: str


class Parity(_Record):
    """What the gate found (`export.gate.Verdict.summary`), and on what."""

    passed: bool
    errors: list[dict[str, str]]
    figures: dict[str, Any]
    thresholds: dict[str, float]
    against: str
    """What the engine was held against."""
    ran_on: str
    """What ran it."""
    images: str
    images_sha256: str
    notes: list[str]


class Manifest(_Record):
    """The manifest, whole."""

    format: Literal["onepass-engine/1"] = FORMAT
    kind: Literal["onnx", "tensorrt"]
    created: str
    """UTC, ISO 8601."""
    preset: str
    architecture: str
    """`torchvision:resnet50`, `timm:...`."""
    bundle_sha256: str
    onnx_sha256: str | None = None
    """Of the ONNX file that a plan was compiled from."""
    engine_sha256: str | None = None
    """Of the plan; an ONNX file cannot hold its own."""
    inputs: list[Port]
    outputs: list[Port]
    opset: int
    input_size: int
    mask_size: int
    """Side of the native mask, in cells."""
    mask_values: Literal["soft", "hard"] = "soft"
    """`hard`: a concrete head gives only 0 and 1."""
    geometry: Literal["squash", "crop"]
    mean: tuple[float, float, float]
    """For information: normalisation is inside the graph."""
    std: tuple[float, float, float]
    class_names: list[str]
    data_classes: list[str]
    class_index: list[int]
    mask_statistics: dict[str, Any] = {}
    """Of the training images' masks, as the bundle has them: what the service holds scored images against."""
    precision: Precision = "fp32"
    precision_details: dict[str, Any] = {}
    """How the precision came about: variant, tool, operators and nodes kept in float32."""
    calibration: Calibration | None = None
    options: dict[str, Any] = {}
    """Options of the graph that differ from the defaults (`export.graph.GraphConfig`)."""
    backend: Literal["tensorrt", "tensorrt-rtx"] | None = None
    profiles: list[Profile] = []
    build: dict[str, Any] = {}
    """Workspace, optimisation level, compatibility, refit, seconds, bytes."""
    gpu: str | None = None
    """The card on which a plan was built; none when it was built without one."""
    compute_capabilities: list[str] = []
    """What a plan was built for, such as `8.9`; empty: whatever its backend takes as the default."""
    versions: dict[str, str] = {}
    parity: Parity | None = None
    throughput: dict[str, Any] | None = None
    """Images per second, and where."""
    rebuild: str
    """The command that makes this artefact again."""


def describe(
    spec: ModelSpec, *, config: GraphConfig, bundle_sha256: str, opset: int, rebuild: str, versions: dict[str, str]
) -> Manifest:
    """The manifest of a bundle's float32 ONNX graph."""
    from dataclasses import asdict

    side: list[int | str] = ["height", "width"] if config.resize or config.dynamic_size else [spec.input_size] * 2
    cells, mask_type = [spec.mask_size] * 2, "uint8" if config.mask_dtype == "uint8" else "float32"
    shapes: dict[str, tuple[str, list[int | str]]] = {
        "logits": ("float32", ["batch", spec.backbone.outputs]),
        "mask": (mask_type, ["batch", *cells]),
        "mask_upsampled": (mask_type, ["batch", *([spec.input_size] * 2 if config.resize else side)]),
        "topk_labels": ("int64", ["batch", config.topk]),
        "topk_masks": (mask_type, ["batch", config.topk, *cells]),
    }
    return Manifest(
        kind="onnx",
        created=now(),
        preset=spec.preset,
        architecture=f"{spec.backbone.source}:{spec.backbone.name}",
        bundle_sha256=bundle_sha256,
        inputs=[Port(name="image", dtype="uint8", shape=["batch", *side, 3])],
        outputs=[Port(name=name, dtype=shapes[name][0], shape=shapes[name][1]) for name in config.output_names],
        opset=opset,
        input_size=spec.input_size,
        mask_size=spec.mask_size,
        mask_values="hard" if spec.masker.binary else "soft",
        geometry=spec.geometry,
        mean=spec.mean,
        std=spec.std,
        class_names=spec.class_names,
        data_classes=spec.data_classes,
        class_index=spec.class_index,
        mask_statistics=spec.mask_statistics,
        options={name: value for name, value in asdict(config).items() if value != getattr(type(config)(), name)},
        versions=versions,
        rebuild=rebuild,
    )


def now() -> str:
    """The time, UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions_of(*distributions: str) -> dict[str, str]:
    """Python's and our own version and those of ``distributions`` that are installed, without importing any."""
    found = {"python": platform.python_version()}
    for name in ("onepass-saliency", *distributions):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def manifest_path(engine: str | Path) -> Path:
    """Where the manifest of a plan is: `model.plan.json` beside `model.plan`."""
    engine = Path(engine)
    return engine.with_name(engine.name + ".json")


def parse_manifest(text: str, where: str | Path, remedy: str) -> Manifest:
    """A manifest from its JSON.

    Raises:
        UsageError: it is none, or one of another format.
    """
    try:
        fields = json.loads(text)
        written = fields.get("format") if isinstance(fields, dict) else None
        if written != FORMAT:
            raise UsageError(f"{where}: its manifest has format {written!r}, this release reads {FORMAT}; {remedy}")
        return Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{where}: its manifest is wrong at {place}: {first['msg']}; {remedy}") from error
    except ValueError as error:
        raise UsageError(f"{where}: its manifest is no JSON ({error}); {remedy}") from error


def read_sidecar(engine: str | Path) -> Manifest:
    """The manifest beside a plan.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    path = manifest_path(engine)
    remedy = f"build the engine again with 'python -m export.trt --model BUNDLE --out {engine}'"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{engine} has no manifest {path.name} beside it; copy both files, or {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}); {remedy}") from error
    return parse_manifest(text, path, remedy)


def write_sidecar(engine: str | Path, manifest: Manifest) -> Path:
    """Write the manifest beside a plan and return where."""
    path = manifest_path(engine)
    write_text(path, manifest.model_dump_json(indent=1) + "\n")
    return path
