"""fp16 and bf16: rewrites the graph so that every node states its own type, as strongly typed TensorRT wants it.

One pass for both types, because ONNX Runtime's converter knows only fp16.  Inputs and outputs of the graph keep their
types; casts stand where a lowered node meets a kept one.  bf16 needs opset 22 for Conv.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.tidy import remove_dead

LowType = Literal["fp16", "bf16"]

BF16_OPSET = 22
_ELEMENT: dict[LowType, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_LARGEST_FP16 = 65504.0

LOWERED_OPS = frozenset(
    [
        "Conv",
        "ConvTranspose",
        "Gemm",
        "MatMul",
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Relu",
        "LeakyRelu",
        "PRelu",
        "Clip",
        "Gelu",
        "Erf",
        "Tanh",
        "HardSwish",
        "HardSigmoid",
        "Sigmoid",
        "Softmax",
        "LayerNormalization",
        "BatchNormalization",
        "GroupNormalization",
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "ReduceMean",
        "Concat",
        "Slice",
        "Split",
        "Transpose",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Expand",
        "Pad",
        "Gather",
        "Identity",
        "Where",
        "Pow",
        "Sqrt",
        "Exp",
        "Neg",
        "Abs",
        "Min",
        "Max",
        "Resize",
    ]
)
"""Operators that have a floating-point input to lower, and no output that must stay as it is."""
_FIXED_INPUTS = {"Resize": (1, 2), "BatchNormalization": (3, 4)}
"""Positions of inputs that stay float32 whatever the type of the data (for BatchNormalization: mean and variance)."""
_MOVES_ONLY = frozenset(
    [
        "Concat",
        "Slice",
        "Transpose",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Expand",
        "Identity",
        "MaxPool",
        "Relu",
    ]
)


def lower(model: onnx.ModelProto, kind: LowType, *, keep: Collection[str] = ()) -> onnx.ModelProto:
    """A copy of ``model`` in which every node but those named in ``keep`` computes in ``kind``."""
    model = _at_opset(model, BF16_OPSET) if kind == "bf16" else _copy(model)
    chosen = lowered_nodes(model, keep)
    _rewrite(model.graph, chosen, kind)
    onnx.checker.check_model(model)
    return model


def emulate(lowered: onnx.ModelProto, kind: LowType) -> onnx.ModelProto:
    """A float32 graph with the values of a graph made by `lower`: weights and every node's results are rounded.

    For runtimes that cannot run the real thing (ONNX Runtime has no bf16 convolution on the CPU).  Sums inside a node
    are made in float32, as tensor cores make them.
    """
    model = _copy(lowered)
    graph = model.graph
    low: set[str] = set()
    for tensor in graph.initializer:
        if tensor.data_type == _ELEMENT[kind]:
            low.add(tensor.name)
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        target = helper.get_attribute_value(node.attribute[0]) if node.op_type == "Cast" else None
        if target == _ELEMENT[kind]:
            nodes.extend(_round_trip(node.input[0], node.output[0], kind))
            low.add(node.output[0])
            continue
        nodes.append(node)
        if target is None and any(name in low for name in node.input):
            for place, name in enumerate(list(node.output)):
                low.add(name)
                node.output[place] = f"{name}_exact"
                nodes.extend(_round_trip(f"{name}_exact", name, kind))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model


def raised(lowered: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """The float32 graph that `lower` made ``lowered`` from: the inverse, so that all but the rounding shows.

    A constant becomes that of ``original`` again where it is the rounding of it, and keeps its value where it is not; a
    cast from one floating-point type to another does nothing.  Whatever else was changed in ``lowered`` stays.
    """
    model = _copy(lowered)
    graph = model.graph
    exact = {tensor.name: tensor for tensor in original.graph.initializer}
    floats = _floating_values(model)
    for tensor in graph.initializer:
        kind: LowType | None = next((low for low, element in _ELEMENT.items() if tensor.data_type == element), None)
        if kind is None:
            continue
        value = numpy_helper.to_array(tensor).astype(np.float32)
        before = exact.get(tensor.name.removesuffix(f"_{kind}"))
        if before is not None:
            wanted = numpy_helper.to_array(before)
            value = wanted if np.array_equal(_round(wanted, kind), value) else value
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in floats and node.output[0] in floats:
            node.CopyFrom(helper.make_node("Identity", node.input, node.output, name=node.name))
    del graph.value_info[:]
    return model


def _floating_values(model: onnx.ModelProto) -> set[str]:
    """Names of all values of the types that `lower` casts between."""
    types = (TensorProto.FLOAT, *_ELEMENT.values())
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    found = {value.name for value in values if value.type.tensor_type.elem_type in types}
    return found | {tensor.name for tensor in graph.initializer if tensor.data_type in types}


def lowered_nodes(model: onnx.ModelProto, keep: Collection[str]) -> set[str]:
    """Names of the nodes that compute in the low type.

    A node that only moves values, and has only kept nodes around it, is kept too: a cast there and back gains nothing.
    """
    floats = float_values(model)
    chosen = {
        node.name
        for node in model.graph.node
        if node.op_type in LOWERED_OPS and node.name not in keep and _float_inputs(node, floats)
    }
    makers = {output: node for node in model.graph.node for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in model.graph.node:
        if node.name in chosen and node.op_type in _MOVES_ONLY:
            before = [makers[name] for name in node.input if name in makers]
            after = [reader for output in node.output for reader in readers.get(output, [])]
            if before and not any(other.name in chosen for other in (*before, *after)):
                chosen.discard(node.name)
    return chosen


def float_values(model: onnx.ModelProto) -> set[str]:
    """Names of all values that are float32."""
    inferred = onnx.shape_inference.infer_shapes(model)
    values = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    found = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return found | {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}


def _rewrite(graph: onnx.GraphProto, chosen: set[str], kind: LowType) -> None:
    model = helper.make_model(graph)
    floats = float_values(model)
    outputs = {value.name for value in graph.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    low: dict[str, str] = {}  # float32 name -> name of the same value in the low type
    high: set[str] = set(constants) | {value.name for value in graph.input}
    made: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.name in chosen:
            for place, name in _float_inputs(node, floats):
                if name in constants:
                    node.input[place] = _low_constant(graph, constants[name], kind, made)
                    continue
                if name not in low:
                    low[name] = f"{name}_{kind}"
                    nodes.append(helper.make_node("Cast", [name], [low[name]], name=low[name], to=_ELEMENT[kind]))
                node.input[place] = low[name]
        else:
            for name in dict.fromkeys(node.input):
                if name in low and name not in high:
                    nodes.append(
                        helper.make_node("Cast", [low[name]], [name], name=f"{name}_fp32", to=TensorProto.FLOAT)
                    )
                    high.add(name)
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name not in floats:
                continue
            if node.name in chosen:
                low[name] = node.output[place] = f"{name}_{kind}"
            else:
                high.add(name)
    for name in outputs:
        if name in low and name not in high:
            nodes.append(helper.make_node("Cast", [low[name]], [name], name=f"{name}_fp32", to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    remove_dead(graph)


def _float_inputs(node: onnx.NodeProto, floats: set[str]) -> list[tuple[int, str]]:
    fixed = _FIXED_INPUTS.get(node.op_type, ())
    return [(place, name) for place, name in enumerate(node.input) if name in floats and place not in fixed]


def _low_constant(graph: onnx.GraphProto, tensor: onnx.TensorProto, kind: LowType, made: dict[str, str]) -> str:
    if tensor.name not in made:
        made[tensor.name] = f"{tensor.name}_{kind}"
        value = _round(numpy_helper.to_array(tensor), kind)
        if kind == "fp16":
            low = numpy_helper.from_array(value.astype(np.float16), made[tensor.name])
        else:
            bits = (np.ascontiguousarray(value).view(np.uint32) >> 16).astype(np.uint16)
            low = helper.make_tensor(made[tensor.name], TensorProto.BFLOAT16, value.shape, bits.tobytes(), raw=True)
        graph.initializer.append(low)
    return made[tensor.name]


def _round(value: np.ndarray, kind: LowType) -> np.ndarray:
    """float32 values rounded to the nearest that ``kind`` can hold, ties to even; fp16 saturates."""
    value = np.asarray(value, dtype=np.float32)
    if kind == "fp16":
        return np.clip(value, -_LARGEST_FP16, _LARGEST_FP16).astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(value).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).reshape(value.shape)


def _round_trip(source: str, target: str, kind: LowType) -> Iterator[onnx.NodeProto]:
    yield helper.make_node("Cast", [source], [f"{target}_low"], name=f"{target}_low", to=_ELEMENT[kind])
    yield helper.make_node("Cast", [f"{target}_low"], [target], name=f"{target}_high", to=TensorProto.FLOAT)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


def _at_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """``model`` at least at ``opset`` (always a copy)."""
    if next(entry.version for entry in model.opset_import if entry.domain == "") >= opset:
        return _copy(model)
    converted = onnx.version_converter.convert_version(model, opset)
    return converted
