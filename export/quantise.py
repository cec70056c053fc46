"""int8 and fp8: Q/DQ nodes in the graph, with ranges measured on images, through ONNX Runtime's quantiser.

Two int8 graphs, because no single one suits both runtimes:

* ``cpu``: unsigned asymmetric activations, signed weights per channel, int32 bias; results are quantised too, so that
  ONNX Runtime chains its integer kernels (three times float32's speed with VNNI).
* ``tensorrt``: symmetric, bias in float, Q/DQ on the inputs of convolutions and matrix products alone, as TensorRT's
  fusions want it (its parser rejects the int32 bias).  fp8 is the same graph with other numbers.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.tidy import remove_dead
from pipeline.errors import WorkError

Variant = Literal["cpu", "tensorrt"]
Method = Literal["minmax", "entropy", "percentile"]

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that are worth quantising: the multiplications."""
CHAINED = ("Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat")
"""Operators that ONNX Runtime also runs on integers, between the products."""
MODELOPT_METHODS: dict[str, dict[str, str]] = {
    "int8": {"minmax": "max", "entropy": "entropy"},
    "fp8": {"minmax": "max"},
}
"""How ModelOpt calls the methods that it has, by the kind of the graph."""
QUANTISER_OPSET = 20
_FP8_LARGEST = 448.0  # of float8 e4m3
_INT8_LARGEST = 127.0
_LEVELS: dict[int, tuple[int, int]] = {TensorProto.UINT8: (0, 255), TensorProto.INT8: (-128, 127)}


def calibrate(
    model: onnx.ModelProto,
    images: np.ndarray,
    *,
    method: Method = "minmax",
    batch: int = 8,
    progress: Callable[[int], Any] | None = None,
) -> Any:
    """The range of every value that could be quantised, over ``images`` (n, S, S, 3) uint8.

    ``minmax``: all of it; ``percentile``: all but one value in 100,000; ``entropy``: what loses least information.
    Runs on the CPU provider: the GPU one may crash in calibration (ultralytics, 2026).  Returns ONNX Runtime's
    ``TensorsData``.
    """
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Once(CalibrationDataReader):
        """A reader of one batch: part by part, or the calibrator would hold every activation of all images."""

        def __init__(self, part: np.ndarray) -> None:
            self._parts = [part]

        def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            return {"image": self._parts.pop()} if self._parts else None

    kinds = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    with tempfile.TemporaryDirectory() as folder, _hushed():
        source, augmented = Path(folder) / "model.onnx", Path(folder) / "augmented.onnx"
        onnx.save(model, source)
        calibrator = create_calibrator(
            source, [*PRODUCTS, *CHAINED], str(augmented), kinds[method], providers=["CPUExecutionProvider"]
        )
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            calibrator.collect_data(Once(part))
            if progress:
                progress(len(part))
        return calibrator.compute_data()


def quantise(model: onnx.ModelProto, ranges: Any, *, variant: Variant, keep: Collection[str] = ()) -> onnx.ModelProto:
    """A copy of ``model`` with int8 Q/DQ nodes around every product but those named in ``keep``."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    copied = onnx.ModelProto()
    copied.CopyFrom(onnx.shape_inference.infer_shapes(model))
    for_cpu = variant == "cpu"
    kinds = [*PRODUCTS, *CHAINED] if for_cpu else list(PRODUCTS)
    options: dict[str, Any] = {"WeightSymmetric": True, "ActivationSymmetric": not for_cpu, "QuantizeBias": for_cpu}
    # Logits stay float: 255 levels between the extremes of the calibration images would cut off the surest answers.
    options["OpTypesToExcludeOutputQuantization"] = ["Gemm"] if for_cpu else kinds
    with _hushed():
        quantiser = QDQQuantizer(
            copied,
            True,  # per channel
            False,  # all of the range: only processors without VNNI saturate
            QuantType.QInt8,
            QuantType.QUInt8 if for_cpu else QuantType.QInt8,
            ranges,
            [],
            list(keep),
            kinds,
            options,
        )
        quantiser.quantize_model()
        quantiser.model.topological_sort()
    result = quantiser.model.model
    del result.graph.value_info[:]
    remove_dead(result.graph)
    onnx.checker.check_model(result)
    return result


def to_fp8(quantised: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """The ``tensorrt`` int8 graph ``quantised`` of ``original`` with float8 (e4m3) in place of int8.

    A scale that maps a range to 127 steps maps it to float8's largest, 448; weights are rounded again from the
    original ones.
    """
    model = onnx.ModelProto()
    model.CopyFrom(quantised)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    originals = {tensor.name: tensor for tensor in original.graph.initializer}
    rescaled: set[str] = set()
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = constants[node.input[1]], constants[node.input[2]]
        if scale.name not in rescaled:
            rescaled.add(scale.name)
            steps = numpy_helper.to_array(scale) * np.float32(_INT8_LARGEST / _FP8_LARGEST)
            scale.CopyFrom(numpy_helper.from_array(steps.astype(np.float32), scale.name))
        if zero.data_type == TensorProto.INT8:
            zero.CopyFrom(_fp8(zero.name, np.zeros(tuple(zero.dims), dtype=np.float32)))
        weight = constants.get(node.input[0])
        if weight is not None and weight.data_type == TensorProto.INT8:
            value = numpy_helper.to_array(originals[weight.name.removesuffix("_quantized")])
            steps = numpy_helper.to_array(scale)
            axis = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "axis"), 1)
            shape = [-1 if k == axis else 1 for k in range(value.ndim)] if steps.ndim else []
            weight.CopyFrom(_fp8(weight.name, value / steps.reshape(shape)))
    onnx.checker.check_model(model)
    return model


def unquantised(quantised: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """The float32 graph that `quantise` and `to_fp8` made ``quantised`` from: the inverse, so that all but the rounding
    shows.

    A constant becomes that of ``original`` again where it lies within one rounding of it, and keeps its value where it
    does not.  A Q/DQ pair of one scale does nothing, and a Relu or Clip that was left to it stands there again.  Whatever
    else was changed in ``quantised`` stays.  Ranges that cut values off do not show.
    """
    model = onnx.ModelProto()
    model.CopyFrom(quantised)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    exact = {tensor.name: tensor for tensor in original.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    pairs: set[str] = set()
    ranges: dict[str, tuple[float, float]] = {}
    for node in graph.node:
        following = readers.get(node.output[0], [])
        if node.op_type == "QuantizeLinear" and _same_steps(node, following, constants):
            pairs.add(node.output[0])
            scale, zero = (numpy_helper.to_array(constants[name]).astype(np.float64) for name in node.input[1:3])
            least, most = _LEVELS.get(constants[node.input[2]].data_type, (-_FP8_LARGEST, _FP8_LARGEST))
            ranges[node.input[0]] = (least - zero.item()) * scale.item(), (most - zero.item()) * scale.item()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.output[0] in pairs or (node.op_type == "DequantizeLinear" and node.input[0] in pairs):
            nodes.append(helper.make_node("Identity", [node.input[0]], [node.output[0]]))
        elif node.op_type == "DequantizeLinear" and node.input[0] in constants:
            value = _dequantised(node, constants, exact.get(node.input[0].removesuffix("_quantized")))
            graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
        else:
            nodes.append(node)
    bounds = _restore_activations(nodes, ranges, original, {node.name for node in graph.node})
    graph.initializer.extend(exact[name] for name in sorted(bounds - constants.keys()))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    remove_dead(graph)
    return model


def _same_steps(node: onnx.NodeProto, readers: list[onnx.NodeProto], constants: dict[str, onnx.TensorProto]) -> bool:
    """Whether all that read the QuantizeLinear ``node`` give back what it was given, but for the rounding."""
    steps = [[numpy_helper.to_array(constants[name]) for name in each.input[1:3]] for each in (node, *readers)]
    return bool(readers) and all(
        reader.op_type == "DequantizeLinear" and all(map(np.array_equal, found, steps[0]))
        for reader, found in zip(readers, steps[1:], strict=True)
    )


def _dequantised(
    node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], original: onnx.TensorProto | None
) -> np.ndarray:
    """The float32 values of a quantised constant: the ``original`` ones where they differ by the rounding alone."""
    stored = constants[node.input[0]]
    levels, scale, zero = (numpy_helper.to_array(constants[name]).astype(np.float64) for name in node.input)
    if scale.ndim:
        axis = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "axis"), 1)
        shape = [-1 if k == axis % levels.ndim else 1 for k in range(levels.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    value = (levels - zero) * scale
    if original is not None:
        half_a_step = scale / 2
        if stored.data_type == TensorProto.FLOAT8E4M3FN:  # 3 bits behind the point, down to 2^-9
            half_a_step = np.maximum(np.abs(value) * 2.0**-4, scale * 2.0**-10)
        wanted = numpy_helper.to_array(original)
        slack = np.abs(value) * 2.0**-20 + half_a_step * 1e-3  # scales and quotients are float32 themselves
        if wanted.shape == value.shape and np.all(np.abs(wanted - value) <= half_a_step + slack):
            return wanted
    return value.astype(np.float32)


def _restore_activations(
    nodes: list[onnx.NodeProto], ranges: dict[str, tuple[float, float]], original: onnx.ModelProto, there: set[str]
) -> set[str]:
    """Put each Relu and Clip back into ``nodes`` that ONNX Runtime left to the range of the Q/DQ pair behind it.

    Only where the pair's range is within the activation's own.  Returns the names of the constants that they read.
    """
    exact = {tensor.name: tensor for tensor in original.graph.initializer}
    read: set[str] = set()
    for activation in original.graph.node:
        value = activation.output[0]
        if activation.op_type not in ("Relu", "Clip") or activation.name in there or value not in ranges:
            continue
        least, most = (0.0, np.inf) if activation.op_type == "Relu" else (-np.inf, np.inf)
        bounds = dict(enumerate(activation.input[1:]))  # either may be left out
        if any(name and name not in exact for name in bounds.values()):
            continue
        if bounds.get(0):
            least = float(numpy_helper.to_array(exact[bounds[0]]).item())
        if bounds.get(1):
            most = float(numpy_helper.to_array(exact[bounds[1]]).item())
        slack = 1e-3 * (ranges[value][1] - ranges[value][0])
        if least - slack <= ranges[value][0] and ranges[value][1] <= most + slack:
            place = next(k for k, node in enumerate(nodes) if value in node.output)
            nodes[place].output[list(nodes[place].output).index(value)] = activation.input[0]
            nodes.insert(place + 1, activation)
            read |= {name for name in bounds.values() if name}
    return read


def with_modelopt(
    model: onnx.ModelProto, images: np.ndarray, *, kind: Literal["int8", "fp8"], keep: Collection[str], method: Method
) -> onnx.ModelProto:
    """NVIDIA's ModelOpt in place of ONNX Runtime's quantiser: the same nodes, and its own places for Q/DQ.

    ``method``: one of `MODELOPT_METHODS`.  It holds all of ``images`` in memory, and measures anew for every graph.

    Raises:
        WorkError: ModelOpt fails.
    """
    from modelopt.onnx.quantization import quantize as modelopt_quantise  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder, _hushed():
        source, target = Path(folder) / "model.onnx", Path(folder) / "quantised.onnx"
        onnx.save(model, source)
        try:
            modelopt_quantise(
                str(source),
                quantize_mode=kind,
                calibration_data={"image": images},
                calibration_method=MODELOPT_METHODS[kind][method],
                calibration_eps=["cpu"],
                nodes_to_exclude=[f"{re.escape(name)}$" for name in sorted(keep)],  # it matches beginnings of names
                output_path=str(target),
                log_level="ERROR",
                high_precision_dtype="fp32",  # the rest is lowered here, so that kept nodes are kept
            )
            return onnx.load(target)
        except Exception as error:  # it raises whatever its parts raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise WorkError(
                f"ModelOpt cannot quantise the graph to {kind} ({reason}); use --quantiser onnxruntime"
            ) from error


def quantised_products(model: onnx.ModelProto) -> list[str]:
    """Names of the multiplications in ``model`` whose second factor, as a rule the weights, comes out of a Q/DQ node."""
    from_levels = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    return [node.name for node in model.graph.node if node.op_type in PRODUCTS and node.input[1] in from_levels]


def _fp8(name: str, value: np.ndarray) -> onnx.TensorProto:
    """float32 values as float8 e4m3, rounded and kept within its range."""
    import ml_dtypes

    inside = np.clip(value, -_FP8_LARGEST, _FP8_LARGEST).astype(ml_dtypes.float8_e4m3fn)
    return helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, value.shape, inside.tobytes(), raw=True)


@contextlib.contextmanager
def _hushed():
    """ONNX Runtime's quantiser prints and logs advice that has been taken."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
