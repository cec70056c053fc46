"""Rewrite a float32 graph to another precision, by name; all of it lives in the graph.

    fp16, bf16      every node but the sensitive ones
    int8-cpu        for ONNX Runtime on the CPU: chains of integer kernels
    int8-tensorrt   for TensorRT: Q/DQ on the inputs of the large layers, fp16 for the rest
    fp8             the same with float8 (e4m3)

Kept in float32 whatever is asked for: normalisation, resizes, the masker's last convolution and its sigmoid, and layers
whose weights amplify rounding.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from export.gate_images import GateImages
from pipeline.cli import Parser, run
from pipeline.errors import UsageError

if TYPE_CHECKING:
    import onnx

    from export.manifest import Precision

Name = Literal["fp32", "fp16", "bf16", "int8-cpu", "int8-tensorrt", "fp8"]
Quantiser = Literal["auto", "onnxruntime", "modelopt"]
Method = Literal["minmax", "entropy", "percentile"]

CALIBRATED = ("int8-cpu", "int8-tensorrt", "fp8")
SENSITIVE_OPS = ("Sigmoid", "Resize", "HardSigmoid", "TopK", "ArgMax")
SMALL_LAYER = 131_072
"""Layers with fewer weights stay in fp16 in the graphs for TensorRT: they are the sensitive ones (stem, depthwise), and
each quantised layer costs kernels of its own, 120 to 190 kB in a plan, which is more than halving its weights saves."""
AMPLIFIES = 30.0
"""A layer with an output whose weights have at least this L2 norm makes the rounding of its input that much larger.
Most layers have 1 to 5; MobileNetV2's first depthwise layer, after folding BatchNorm, 145: kept in float32, it halves
the error of fp16 in logits and mask."""


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """A graph in another precision."""

    model: onnx.ModelProto
    """What is compiled or run."""
    stand_in: onnx.ModelProto | None
    """What ONNX Runtime runs on the CPU in its place where it cannot run the graph itself."""
    precision: Precision
    details: dict[str, Any]
    """For the manifest."""
    notes: list[str] = field(default_factory=list)


def manifest_precision(name: Name) -> Precision:
    """The precision as manifests call it: `int8` for both int8 graphs."""
    return "int8" if name.startswith("int8") else name  # pyright: ignore[reportReturnType]


def products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The multiplications: what precision is about."""
    return [node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]


def sensitive_nodes(model: onnx.ModelProto, further_ops: Collection[str] = ()) -> set[str]:
    """Names of the nodes that are kept in float32: see the module's docstring.

    ``further_ops``: operators of the user's (``--keep-fp32``).
    """
    nodes = list(model.graph.node)
    makers = {output: node for node in nodes for output in node.output}
    kept = {node.name for node in nodes if node.op_type in (*SENSITIVE_OPS, *further_ops)}
    found = products(model)
    kept |= _amplifiers(model, found)
    constants = {tensor.name for tensor in model.graph.initializer}
    layers = [node for node in found if constants.intersection(node.input[:2])]  # resizing inside multiplies, too
    if layers:
        kept |= {node.name for node in _before(layers[0], makers)}  # normalisation, and resizing inside
    for name in ("mask", "mask_upsampled", "topk_masks"):
        if name in makers:
            kept |= _last_layer(makers[name], makers)
    return kept


def _amplifiers(model: onnx.ModelProto, layers: Sequence[onnx.NodeProto]) -> set[str]:
    """Names of the convolutions that amplify rounding (`AMPLIFIES`)."""
    import numpy as np
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found = set()
    for node in layers:
        if node.op_type == "Conv" and node.input[1] in constants:
            weights = numpy_helper.to_array(constants[node.input[1]]).astype(np.float64)
            if np.sqrt((weights**2).sum(axis=tuple(range(1, weights.ndim)))).max() >= AMPLIFIES:
                found.add(node.name)
    return found


def _before(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Every node that ``node`` depends on."""
    found: dict[str, onnx.NodeProto] = {}
    waiting = [node]
    while waiting:
        for name in waiting.pop().input:
            if name in makers and makers[name].name not in found:
                found[makers[name].name] = makers[name]
                waiting.append(makers[name])
    return list(found.values())


def _last_layer(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto], *, parts: int = 2) -> set[str]:
    """Names of the masker's last convolution, and of what stands between it and ``node``.

    It is computed in two parts (`Masker`): filters on each layer's maps, and, up-sampled, their sum over the window.
    """
    found = {node.name}
    if node.op_type in ("Conv", "Gemm", "MatMul"):
        parts -= 1
    for name in node.input if parts else ():
        if name in makers:
            found |= _last_layer(makers[name], makers, parts=parts)
    return found


class Rewriter:
    """Rewrites one float32 graph to one precision, again and again with other layers restored; calibrates once."""

    def __init__(
        self,
        model: onnx.ModelProto,
        name: Name,
        *,
        calibration: GateImages | None = None,
        method: Method = "minmax",
        keep_ops: Sequence[str] = (),
        quantiser: Quantiser = "auto",
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        """``calibration``: images for the int8 and fp8 ranges; ``progress`` is told how many of them were run.

        Raises:
            UsageError: there is nothing to calibrate on, ``keep_ops`` names an unknown operator, or see `use_modelopt`.
        """
        if name in CALIBRATED and calibration is None:
            raise UsageError(
                f"--precision {name.removesuffix('-tensorrt')} needs images to calibrate on, and there is no bundle with "
                "samples; give --calib-data DIR"
            )
        unknown = set(keep_ops) - {node.op_type for node in model.graph.node}
        if unknown:
            there = ", ".join(sorted({node.op_type for node in model.graph.node}))
            raise UsageError(f"--keep-fp32 {sorted(unknown)[0]}: the graph has no such operator; it has {there}")
        self.model = model
        self.name: Name = name
        self.method: Method = method
        self.sensitive = sensitive_nodes(model, keep_ops)
        self._calibration, self._progress = calibration, progress
        self._ranges: Any = None
        self._modelopt = use_modelopt(name, quantiser, method)

    def candidates(self) -> list[str]:
        """Names of the layers that are lowered unless they are restored, in the graph's order."""
        return [node.name for node in products(self.model) if node.name not in self.sensitive]

    def quantised_layers(self) -> list[str]:
        """Those of `candidates` that an int8 or fp8 graph quantises; the others are fp16 in the graphs for TensorRT."""
        return [
            node.name
            for node in products(self.model)
            if node.name not in self.sensitive and (self.name == "int8-cpu" or self._weights(node) >= SMALL_LAYER)
        ]

    def rewrite(self, restore: Collection[str] = ()) -> Rewritten:
        """The graph in the wanted precision, with the layers ``restore`` one step higher.

        A step higher than int8 and fp8 is fp16 in the graphs for TensorRT, and float32 anywhere else.
        """
        from export.lowering import emulate, lower

        if self.name == "fp32":
            return Rewritten(model=self.model, stand_in=None, precision="fp32", details={})
        details: dict[str, Any] = {"name": self.name, "kept": sorted(self.sensitive), "restored": sorted(restore)}
        if self.name in CALIBRATED:
            model, further = self._quantised(set(restore))
            precision = manifest_precision(self.name)
            return Rewritten(model=model, stand_in=None, precision=precision, details=details | further)
        kept = self.sensitive | set(restore)
        if self.name == "fp16":
            model = lower(self.model, "fp16", keep=kept)
            return Rewritten(model=model, stand_in=None, precision="fp16", details=details)
        model = lower(self.model, "bf16", keep=kept)
        note = (
            "ONNX Runtime's CPU provider has no bf16 convolution: bf16 was emulated, with weights and every node's "
            "results rounded to bf16"
        )
        return Rewritten(model=model, stand_in=emulate(model, "bf16"), precision="bf16", details=details, notes=[note])

    def unrounded(self, rewritten: Rewritten) -> onnx.ModelProto | None:
        """The float32 graph that `rewrite` made ``rewritten`` from, with all that is changed in it but the rounding.

        None where ModelOpt made it, whose changes are not known here.
        """
        from export.lowering import raised
        from export.quantise import unquantised

        if self._modelopt:
            return None
        return unquantised(raised(rewritten.model, self.model), self.model)

    def _quantised(self, restore: set[str]) -> tuple[onnx.ModelProto, dict[str, Any]]:
        from export import quantise
        from export.lowering import lower

        assert self._calibration is not None
        layers = self.quantised_layers()
        low = {name for name in layers if name not in restore}
        details = {
            "quantiser": "modelopt" if self._modelopt else "onnxruntime",
            "calibration_method": self.method,
        }
        if self.name == "int8-cpu":
            model = quantise.quantise(self.model, self._measured(), variant="cpu", keep=self.sensitive | restore)
            return model, details | {"quantised": len(quantise.quantised_products(model))}
        rest = self.sensitive | {name for name in self.candidates() if name not in low}
        if self._modelopt:
            kind = "fp8" if self.name == "fp8" else "int8"
            images = self._calibration.images
            model = quantise.with_modelopt(self.model, images, kind=kind, keep=rest, method=self.method)
        else:
            model = quantise.quantise(self.model, self._measured(), variant="tensorrt", keep=rest)
            if self.name == "fp8":
                model = quantise.to_fp8(model, self.model)
        details |= {"quantised": len(quantise.quantised_products(model)), "rest": "fp16"}
        return lower(model, "fp16", keep=self.sensitive | (restore - set(layers)) | low), details

    def _measured(self) -> Any:
        from export.quantise import calibrate

        if self._ranges is None:
            assert self._calibration is not None
            self._ranges = calibrate(self.model, self._calibration.images, method=self.method, progress=self._progress)
        return self._ranges

    def _weights(self, node: onnx.NodeProto) -> int:
        tensor = next((t for t in self.model.graph.initializer if t.name in node.input[1:2]), None)
        if tensor is None:
            return SMALL_LAYER  # a product of two activations, as in attention
        count = 1
        for size in tensor.dims:
            count *= size
        return count


def use_modelopt(name: Name, quantiser: Quantiser, method: Method) -> bool:
    """Whether ModelOpt quantises: when asked for, or by default where it is installed and has the method.

    Raises:
        UsageError: it was asked for and is not there, or has nothing to do with this graph, or not this method.
    """
    from export.quantise import MODELOPT_METHODS

    methods = MODELOPT_METHODS.get(name.removesuffix("-tensorrt"), {})
    if quantiser == "modelopt" and not methods:
        raise UsageError(
            f"--quantiser modelopt: it makes int8 and fp8 graphs for TensorRT, no {name}; leave the flag out"
        )
    if quantiser == "modelopt" and method not in methods:
        raise UsageError(
            f"--calib-method {method}: for {name} ModelOpt has {', '.join(methods)} only; use that, or --quantiser "
            "onnxruntime"
        )
    if quantiser == "onnxruntime" or method not in methods:
        return False
    try:
        import modelopt.onnx.quantization  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        if quantiser == "modelopt":
            raise UsageError(
                f"--quantiser modelopt: {' '.join(str(error).split())}; install 'nvidia-modelopt[onnx]', or leave "
                "the flag out for ONNX Runtime's quantiser"
            ) from error
        return False
    return True


def parser() -> Parser:
    """The command's flags."""
    flags = Parser("export.precision", __doc__ or "")
    flags.formatter_class = argparse.RawDescriptionHelpFormatter  # the names stand in a table
    source = flags.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="BUNDLE", help="the bundle to export")
    source.add_argument("--onnx", metavar="FILE", help="a float32 graph of export.onnx, instead of a bundle")
    flags.add_argument("--out", required=True, metavar="FILE", help="where the graph goes, such as model.int8.onnx")
    flags.add_argument("--precision", required=True, choices=get_args(Name)[1:], help="what to rewrite the graph to")
    add_rewriting(flags)
    add_judging(flags)
    flags.add_argument("--search", action="store_true", help="raise the layers that hurt; prints the Pareto table")
    return flags


def add_rewriting(flags: Parser) -> None:
    """Flags that `export.precision` and `export.trt` share: calibration, and what is kept."""
    flags.add_argument("--calib-data", metavar="DIR", help="images to calibrate on (default: the bundle's samples)")
    flags.add_argument("--calib-images", type=int, default=512, metavar="N", help="at most so many (default 512)")
    flags.add_argument("--calib-method", choices=get_args(Method), default="minmax", help="how ranges are chosen")
    flags.add_argument("--keep-fp32", default="", metavar="OPS", help="further operators to keep, such as Softmax,Add")
    flags.add_argument(
        "--quantiser", choices=get_args(Quantiser), default="auto", help="auto: ModelOpt where installed, for TensorRT"
    )


def add_judging(flags: Parser) -> None:
    """Flags of the gate that the exporters share."""
    flags.add_argument("--parity-data", metavar="DIR", help="images for the gate (default: the bundle's samples)")
    flags.add_argument("--parity-images", type=int, default=256, metavar="N", help="at most so many (default 256)")
    flags.add_argument("--max-drop", type=float, metavar="X", help="most that LE, OM, F1 and mask IoU may worsen")
    flags.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    flags.add_argument("--report", action="store_true", help="write OUT.parity.html and .json also when it passes")


def main(argv: Sequence[str] | None = None) -> None:
    """Rewrite, judge, write."""
    arguments = parser().parse_args(argv)
    from export.files import check_local, ensure_writable
    from export.judged import Judging, check_rewriting, check_source, serialise, write_judged
    from export.search import searched
    from export.source import calibration_images, open_source
    from export.verify import progress_bar

    check_local(arguments, "model", "onnx", "out", "parity_data", "calib_data")
    out = Path(arguments.out)
    if out.suffix != ".onnx":
        raise UsageError(f"--out {out}: the name has to end in .onnx")
    judging = Judging.of(arguments)
    use_modelopt(arguments.precision, arguments.quantiser, arguments.calib_method)  # refuses before any work
    ensure_writable(out)
    source = open_source(arguments)
    notes = check_source(source, judging)
    calibration = calibration_images(source, arguments) if arguments.precision in CALIBRATED else None
    with progress_bar(len(calibration.images) if calibration else 0, "calibration") as advance:
        rewriter = Rewriter(
            source.model, arguments.precision, calibration=calibration, method=arguments.calib_method,
            keep_ops=[op for op in arguments.keep_fp32.split(",") if op], quantiser=arguments.quantiser,
            progress=advance,
        )  # fmt: skip
        if arguments.search:
            rewritten = searched(
                rewriter, source, judging, calibration=calibration,
                size_of=lambda model: len(serialise(model, source.manifest)),
            )  # fmt: skip
        else:
            rewritten = rewriter.rewrite()
    notes += check_rewriting(rewriter, rewritten, source, judging)
    words = ["python", "-m", "export.precision", *(argv if argv is not None else sys.argv[1:])]
    manifest = source.describe(rewritten, calibration, arguments.calib_method, rebuild=shlex.join(words))
    write_judged(
        rewritten.model, manifest, source, out, judging, stand_in=rewritten.stand_in,
        calibration=calibration, notes=[*notes, *rewritten.notes], say=print,
    )  # fmt: skip
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run(main, "export.precision")
