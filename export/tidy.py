"""Removes from an exported graph the arithmetic on shapes, and on weights, that is known beforehand.

PyTorch's exporter computes sizes while the graph runs as soon as one dimension (here the batch) is dynamic:
Shape, Concat and Gather nodes that feed Resize, Reshape and Expand.  Each of them keeps a parser busy, and TensorRT
from fusing.  Every size but the batch is known, so constants can say the same.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Dims = list[int | str]
"""Sizes of a value's dimensions: ints, names of dynamic dimensions, and "" for unknown ones."""


def tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with constants in place of shape arithmetic where at most one size is dynamic; changed in place."""
    graph = model.graph
    dims = known_dims(model)
    values = shape_values(graph, dims)
    for node in graph.node:
        if node.op_type == "Resize":
            _resize_by_scales(graph, node, dims)
        elif node.op_type == "Reshape":
            _constant_reshape(graph, node, values)
        elif node.op_type == "Expand":
            _constant_expand(graph, node, dims, values)
    _cut_weights(graph)
    remove_dead(graph)
    _cast_first(graph)
    _strip_provenance(graph)
    return model


_CUTS = ("Split", "Slice", "Transpose", "Reshape", "Squeeze", "Unsqueeze")


def _cut_weights(graph: onnx.GraphProto) -> None:
    """Do once what the graph would do in every run: cut and turn weights, as the parts of the masker's last layer are.

    The exporter leaves it to the runtime when there are more than a thousand of them.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in _CUTS and all(name in constants for name in node.input if name):
            inputs = {name: numpy_helper.to_array(constants[name]) for name in node.input if name}
            for name, value in zip(node.output, ReferenceEvaluator(node).run(None, inputs), strict=True):
                constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
                graph.initializer.append(constants[name])
    computed = {tensor.name for tensor in graph.initializer}
    kept = [node for node in graph.node if not computed & set(node.output)]
    del graph.node[:]
    graph.node.extend(kept)


def known_dims(model: onnx.ModelProto) -> dict[str, Dims]:
    """Shape of every value as far as it is known."""
    inferred = onnx.shape_inference.infer_shapes(model)
    shapes: dict[str, Dims] = {}
    for source in (inferred, model):  # what the exporter wrote wins over what is inferred
        for value in (*source.graph.value_info, *source.graph.input, *source.graph.output):
            if value.type.tensor_type.HasField("shape"):
                shapes[value.name] = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
    return shapes


def shape_values(graph: onnx.GraphProto, dims: dict[str, Dims]) -> dict[str, Dims]:
    """What the graph's small integer vectors hold, with the names of dynamic dimensions standing for their sizes."""
    values: dict[str, Dims] = {}
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT64 and len(tensor.dims) <= 1 and sum(tensor.dims) <= 16:
            values[tensor.name] = [int(v) for v in numpy_helper.to_array(tensor).reshape(-1)]
    for node in graph.node:
        found = _evaluate(node, dims, values)
        if found is not None:
            values[node.output[0]] = found
    return values


def _evaluate(node: onnx.NodeProto, dims: dict[str, Dims], values: dict[str, Dims]) -> Dims | None:
    """The result of one node of shape arithmetic, None where it is not known."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Shape" and node.input[0] in dims:
        return dims[node.input[0]][attributes.get("start", 0) : attributes.get("end")]
    if not node.input or any(name not in values for name in node.input if name):
        return None
    inputs = [values[name] for name in node.input if name]
    if node.op_type == "Concat":
        return [d for part in inputs for d in part]
    if node.op_type in ("Identity", "Cast", "Squeeze", "Unsqueeze"):
        return inputs[0]
    if node.op_type == "Gather" and all(isinstance(k, int) for k in inputs[1]):
        return [inputs[0][int(k)] for k in inputs[1]]
    if node.op_type == "Slice" and (len(inputs) < 5 or inputs[4] == [1]):
        start, end = int(inputs[1][0]), int(inputs[2][0])
        return inputs[0][slice(max(start, -len(inputs[0])), end)]
    return None


def remove_dead(graph: onnx.GraphProto) -> None:
    """Drop nodes, initialisers and value infos that no output depends on."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed.update(node.input)
    kept.reverse()
    initialisers = [tensor for tensor in graph.initializer if tensor.name in needed]
    infos = [value for value in graph.value_info if value.name in needed]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.initializer.extend(initialisers)
    graph.value_info.extend(infos)


def _resize_by_scales(graph: onnx.GraphProto, node: onnx.NodeProto, dims: dict[str, Dims]) -> None:
    """``sizes`` computed from the batch -> constant ``scales``.

    Sizes with opset 18's ``axes`` would be plainer, but TensorRT's parser then takes the batch for -1 cells.
    """
    before, after = dims.get(node.input[0], []), dims.get(node.output[0], [])
    if len(node.input) < 4 or not node.input[3] or len(before) != 4 or len(after) != 4:
        return
    scales = [1.0, 1.0]
    for source, target in zip(before[2:], after[2:], strict=True):
        if not (isinstance(source, int) and isinstance(target, int)):
            return
        scales.append(scale_for(source, target))
    name = "scales_" + "_".join(f"{d}" for d in (*before[2:], *after[2:]))
    source_name = node.input[0]
    del node.input[:]
    node.input.extend([source_name, "", _constant(graph, name, np.array(scales, dtype=np.float32))])


def scale_for(source: int, target: int) -> float:
    """The float32 scale that is nearest to target / source from above: floor(source * scale) must be ``target``."""
    scale = np.float32(target / source)
    while np.floor(np.float32(source) * scale) < target or int(source * float(scale)) < target:
        scale = np.nextafter(scale, np.float32(np.inf))
    return float(scale)


def _constant_reshape(graph: onnx.GraphProto, node: onnx.NodeProto, values: dict[str, Dims]) -> None:
    """A shape with one dynamic size -> the constant with -1 in its place."""
    shape = values.get(node.input[1])
    if shape is None or "" in shape or 0 in shape:
        return
    wanted = [d if isinstance(d, int) else -1 for d in shape]
    if wanted.count(-1) <= 1:
        node.input[1] = _constant_shape(graph, wanted)


def _constant_expand(
    graph: onnx.GraphProto, node: onnx.NodeProto, dims: dict[str, Dims], values: dict[str, Dims]
) -> None:
    """A dimension that keeps its dynamic size is a 1 in the constant shape: Expand broadcasts both ways."""
    before, after = dims.get(node.input[0]), values.get(node.input[1])
    if before is None or after is None or len(before) != len(after) or "" in after:
        return
    if any(not isinstance(a, int) and a != b for b, a in zip(before, after, strict=True)):
        return  # it really grows to the batch
    node.input[1] = _constant_shape(graph, [a if isinstance(a, int) else 1 for a in after])


def _cast_first(graph: onnx.GraphProto) -> None:
    """The cast of the image becomes the first node: whoever reads the graph sees at once what enters it."""
    image = graph.input[0].name
    nodes = sorted(graph.node, key=lambda node: not (node.op_type == "Cast" and image in node.input))
    del graph.node[:]
    graph.node.extend(nodes)


def _strip_provenance(graph: onnx.GraphProto) -> None:
    """Remove stack traces and file names of the exporting machine."""
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""


def _constant_shape(graph: onnx.GraphProto, value: list[int]) -> str:
    name = "shape_" + "_".join(str(v).replace("-", "minus") for v in value)
    return _constant(graph, name, np.array(value, dtype=np.int64))


def _constant(graph: onnx.GraphProto, name: str, value: np.ndarray) -> str:
    """``name``, after making sure that the graph has an initialiser of that name."""
    if not any(tensor.name == name for tensor in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(value, name))
    return name
