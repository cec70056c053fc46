"""What may be wrong with a graph, by name, with the kind of failure that it has to be."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.gate import BatchError, LogitsError, MaskError, MaskShapeError


def initialiser(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def scale_layer(model: onnx.ModelProto, part: str) -> None:
    convolution = next(node for node in model.graph.node if node.op_type == "Conv" and part in node.input[1])
    name = convolution.input[1]
    quantised = next((node for node in model.graph.node if name in node.output), None)
    tensor = initialiser(
        model, quantised.input[1] if quantised else name
    )  # 1.05 times the step is 1.05 times the value
    value = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((value * np.float32(1.05)).astype(value.dtype), tensor.name))


def last_weights(model: onnx.ModelProto) -> str:
    makers = {output: node for node in model.graph.node for output in node.output}
    node = makers["mask"]
    while node.op_type != "Conv":
        node = makers[node.input[0]]
    return node.input[1]


def rewire(model: onnx.ModelProto, name: str, *nodes: onnx.NodeProto, **constants: np.ndarray) -> None:
    """Put ``nodes`` behind the value ``name``; they read `before` and give ``name``."""
    for node in model.graph.node:
        node.output[:] = ["before" if output == name else output for output in node.output]
    model.graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in constants.items())
    kept = list(model.graph.node)
    place = next(k for k, node in enumerate(kept) if "before" in node.output) + 1
    del model.graph.node[:]
    model.graph.node.extend([*kept[:place], *nodes, *kept[place:]])


def wrong_mean(model: onnx.ModelProto) -> None:
    tensor = next(
        t for t in model.graph.initializer if list(t.dims) == [1, 3, 1, 1] and numpy_helper.to_array(t).max() < 0
    )
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0.1), tensor.name))


def swapped_channels(model: onnx.ModelProto) -> None:
    cast = next(node for node in model.graph.node if "image" in node.input).output[0]
    rewire(model, cast, helper.make_node("Gather", ["before", "order"], [cast], axis=3), order=np.array([2, 1, 0]))


def shifted_mask(model: onnx.ModelProto) -> None:
    shifted = np.maximum(np.arange(16) - 1, 0)
    rewire(model, "mask", helper.make_node("Gather", ["before", "columns"], ["mask"], axis=2), columns=shifted)


def row_dependent(model: onnx.ModelProto) -> None:
    rewire(
        model,
        "mask",
        helper.make_node("Shape", ["before"], ["rows"], start=0, end=1),
        helper.make_node("ConstantOfShape", ["rows"], ["ones"], value=numpy_helper.from_array(np.ones(1, np.float32))),
        helper.make_node("CumSum", ["ones", "axis"], ["place"]),
        helper.make_node("Mul", ["place", "little"], ["offset"]),
        helper.make_node("Reshape", ["offset", "column"], ["offsets"]),
        helper.make_node("Sub", ["before", "offsets"], ["mask"]),
        axis=np.array(0),
        little=np.array(0.0005, np.float32),
        column=np.array([-1, 1, 1]),
    )


SABOTEURS = {
    "a layer of the classifier scaled by 1.05": (lambda model: scale_layer(model, "layer2.0.conv1"), LogitsError),
    "a layer of the masker scaled by 1.05": (lambda model: scale_layer(model, last_weights(model)), MaskError),
    "a wrong mean": (wrong_mean, LogitsError),
    "swapped channels": (swapped_channels, LogitsError),
    "the mask shifted by one cell": (shifted_mask, MaskShapeError),
    "an error that depends on the row": (row_dependent, BatchError),
}
