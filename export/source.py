"""What an export starts from: a bundle, traced, or a float32 graph that was exported before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.engine import Engine, OnnxEngine, default_threads
from export.gate_images import GateImages, apart_from, gate_images
from export.manifest import Calibration, Manifest, describe, now, versions_of
from pipeline.errors import UsageError

if TYPE_CHECKING:
    import onnx

    from export.graph import GraphConfig
    from export.precision import Rewritten
    from pipeline.bundle import Bundle

TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime")
"""Distributions whose versions a manifest keeps."""
FEWEST_UNSEEN = 32
"""Fewer images that were not calibrated on are too few to judge by, where there are others."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A float32 graph and what it is judged against."""

    path: Path
    """The bundle or the ONNX file."""
    model: onnx.ModelProto
    manifest: Manifest
    bundle: Bundle | None

    def reference(self, threads: int | None) -> Engine:
        """What an engine is held against: torch where there is a bundle, else the float32 graph."""
        if self.bundle is None:
            return OnnxEngine(self.path, provider="cpu", threads=threads or default_threads())
        from export.torch_engine import TorchEngine

        return TorchEngine(self.path, threads=threads, bundle=self.bundle, config=self.config)

    @property
    def config(self) -> GraphConfig:
        """The graph's options."""
        from export.graph import GraphConfig

        return GraphConfig(**self.manifest.options)

    def images(self, data: str | None, count: int, flag: str, *, calibration: GateImages | None = None) -> GateImages:
        """The images of ``data``, else the bundle's samples, else noise: those not in ``calibration``, if there are enough."""
        samples = self.bundle.samples if self.bundle else None
        if calibration is None:
            return gate_images(self.manifest, samples, data, count, flag=flag)
        found = gate_images(self.manifest, samples, data, count + len(calibration.images), flag=flag)
        unseen = apart_from(found, calibration)
        enough = min(FEWEST_UNSEEN, count, max(1, len(found.images) // 3))
        return unseen.first(count) if len(unseen.images) >= enough else found.first(count)

    def describe(self, rewritten: Rewritten, calibration: GateImages | None, method: str, *, rebuild: str) -> Manifest:
        """The manifest of a graph rewritten from this one."""
        opset = next(entry.version for entry in rewritten.model.opset_import if entry.domain == "")
        seen = None
        if calibration is not None:
            seen = Calibration(
                source=calibration.source, images=len(calibration.images), sha256=calibration.sha256, method=method
            )
        return self.manifest.model_copy(
            update={
                "created": now(),
                "opset": opset,
                "precision": rewritten.precision,
                "precision_details": rewritten.details,
                "calibration": seen,
                "parity": None,
                "throughput": None,
                "versions": versions_of(*TOOLS, "nvidia-modelopt"),
                "rebuild": rebuild,
            }
        )


def from_bundle(bundle: Bundle, *, config: GraphConfig, opset: int, rebuild: str) -> Source:
    """Trace a loaded bundle."""
    from export.trace import trace

    manifest = describe(
        bundle.spec,
        config=config,
        bundle_sha256=bundle.sha256,
        opset=opset,
        rebuild=rebuild,
        versions=versions_of(*TOOLS),
    )
    return Source(path=bundle.path, model=trace(bundle, config, opset), manifest=manifest, bundle=bundle)


def from_graph(path: Path, *, flag: str = "--onnx") -> Source:
    """Read a graph of `export.onnx`.

    Raises:
        UsageError: no such file, something else, or a graph that has been rewritten already.
    """
    if not path.is_file():
        raise UsageError(f"{flag} {path}: no such file; export one with 'python -m export.onnx'")
    if path.suffix != ".onnx":
        raise UsageError(f"{flag} {path}: the name has to end in .onnx")
    engine = OnnxEngine(path, provider="cpu", threads=1)  # refuses damaged and foreign files
    if engine.info.precision != "fp32":
        raise UsageError(f"{flag} {path} is {engine.info.precision} already; start from the float32 graph")
    import onnx

    manifest = Manifest.model_validate(engine.info.manifest)
    return Source(path=path, model=onnx.load(path), manifest=manifest, bundle=None)


def open_source(arguments: Any, config: GraphConfig | None = None, opset: int | None = None) -> Source:
    """The source that ``--model`` or ``--onnx`` names."""
    from export.graph import GraphConfig
    from export.trace import DEFAULT_OPSET
    from pipeline.bundle import load_bundle

    if arguments.calib_images < 1:
        raise UsageError(f"--calib-images {arguments.calib_images}: use a number from 1 up")
    if arguments.onnx is not None:
        return from_graph(Path(arguments.onnx))
    bundle = load_bundle(arguments.model)
    return from_bundle(bundle, config=config or GraphConfig(), opset=opset or DEFAULT_OPSET, rebuild="")


def calibration_images(source: Source, arguments: Any) -> GateImages | None:
    """The images of ``--calib-data`` (of its training split, where it has one), else the bundle's samples, if any.

    Where the gate takes the samples, too, only every second one, so that it has others to judge by.
    """
    samples = source.bundle.samples if source.bundle else None
    if arguments.calib_data is None and (samples is None or not len(samples)):
        return None
    if samples is not None and arguments.parity_data is None:
        samples = samples[::2]
    return gate_images(
        source.manifest, samples, arguments.calib_data, arguments.calib_images, flag="--calib-data",
        splits=("train", "val", "test"),
    )  # fmt: skip
