"""Precision in the graph: what is lowered, what is kept, and what comes out."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from export import parity
from export import precision as command
from export import session as sessions
from export.engine import open_engine
from export.gate_images import from_samples
from export.graph import GraphConfig
from export.lowering import emulate, lower
from export.onnx import export_onnx
from export.precision import SMALL_LAYER, Rewriter, sensitive_nodes
from export.saturation import sums_saturate
from export.session import open_session
from export.source import from_graph
from pipeline.errors import UsageError


@pytest.fixture(scope="module")
def source(exported):
    return from_graph(exported.path)


@pytest.fixture(scope="module")
def images(bundle):
    return from_samples(bundle.samples, 8)


def nodes(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind]


def weights(model: onnx.ModelProto, node: onnx.NodeProto) -> onnx.TensorProto:
    """The stored weights of a layer, through a DequantizeLinear where there is one."""
    makers = {output: maker for maker in model.graph.node for output in maker.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    name = node.input[1]
    while name not in constants:
        name = makers[name].input[0]
    return constants[name]


def infer(model: onnx.ModelProto, images: np.ndarray, *, fuse: bool = True) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if not fuse:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, {"image": images})]


def test_sensitive_nodes_are_normalisation_resizes_and_the_end(source):
    kept = sensitive_nodes(source.model)
    kinds = Counter(node.op_type for node in source.model.graph.node if node.name in kept)
    assert kinds == {"Cast": 1, "Transpose": 1, "Mul": 1, "Add": 3, "Resize": 2, "Conv": 4, "Sigmoid": 1, "Squeeze": 1}
    *parts, last = (node for node in nodes(source.model, "Conv") if node.name in kept)
    shapes = [list(weights(source.model, node).dims) for node in (*parts, last)]
    assert shapes == [*[[9, 64, 1, 1]] * 3, [1, 9, 3, 3]]
    assert len(sensitive_nodes(source.model, ["Gemm"]) - kept) == 1


@pytest.mark.parametrize("name", ["fp16", "int8-cpu"])
def test_resizing_inside_stays_in_float32(bundle, images, tmp_path, name):
    """In half precision the places of a picture's pixels, which the resize computes, go wrong from 1024 on."""
    export_onnx(bundle, tmp_path / "model.onnx", config=GraphConfig(resize=True))
    graph = onnx.load(tmp_path / "model.onnx")
    rewriter = Rewriter(graph, name, calibration=images)
    resizing = {node.name for node in nodes(graph, "MatMul")}
    assert (
        len(resizing) == 2
        and resizing <= rewriter.sensitive
        and "Round" in {node.op_type for node in graph.graph.node if node.name in rewriter.sensitive}
    )
    picture = np.repeat(np.repeat(images.images[:1], 3, axis=1), 40, axis=2)  # 192 x 2560
    (exact, _), (found, _) = infer(graph, picture), infer(rewriter.rewrite().model, picture)
    assert np.abs(found - exact).max() < 0.5 * exact.std()


@pytest.mark.parametrize("kind, element", [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
def test_lowered_graphs_keep_their_ports_and_halve_their_weights(source, kind, element):
    kept = sensitive_nodes(source.model)
    model = lower(source.model, kind, keep=kept)
    onnx.checker.check_model(model, full_check=True)
    types = [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)]
    assert types == [TensorProto.UINT8, TensorProto.FLOAT, TensorProto.FLOAT]
    stored = {node.name: weights(model, node).data_type for node in nodes(model, "Conv")}
    assert Counter(stored.values()) == {element: len(stored) - 4, TensorProto.FLOAT: 4}
    assert len(model.SerializeToString()) < 0.51 * len(source.model.SerializeToString())
    assert len(nodes(model, "Cast")) <= 10  # none of them between two lowered nodes


def test_rounding_to_bf16_is_to_the_nearest_even(source):
    model = lower(source.model, "bf16")
    lowered = numpy_helper.to_array(weights(model, nodes(model, "Conv")[0])).astype(np.float32)
    exact = numpy_helper.to_array(weights(source.model, nodes(source.model, "Conv")[0]))
    assert np.abs(lowered / exact - 1).max() <= 2**-8
    assert abs((lowered - exact).mean()) < 1e-3 * np.abs(exact).mean()  # no drift, as truncation would have


def test_emulation_has_the_values_of_the_real_thing(source, images):
    kept = sensitive_nodes(source.model)
    real = lower(source.model, "fp16", keep=kept)
    exact, expected, found = (infer(m, images.images) for m in (source.model, real, emulate(real, "fp16")))
    error = [np.abs(a - b).mean() for a, b in zip(expected, exact, strict=True)]
    apart = [np.abs(a - b).mean() for a, b in zip(found, expected, strict=True)]
    assert all(a < 2 * e for a, e in zip(apart, error, strict=True))  # roundings of the same size, not the same ones
    rounded = infer(emulate(lower(source.model, "bf16"), "bf16"), images.images)[0]
    assert np.array_equal(rounded.view(np.uint32) & 0xFFFF, np.zeros(rounded.shape, np.uint32))  # truly bf16 values


def test_int8_for_the_cpu(source, images):
    model = Rewriter(source.model, "int8-cpu", calibration=images).rewrite().model
    assert Counter(weights(model, node).data_type for node in nodes(model, "Conv")) == {
        TensorProto.INT8: 23,
        TensorProto.FLOAT: 4,
    }
    zero = {numpy_helper.to_array(t).dtype for t in model.graph.initializer if t.name.endswith("_zero_point")}
    assert np.dtype(np.uint8) in zero and np.dtype(np.int32) in zero  # unsigned activations, int32 bias
    assert len(model.SerializeToString()) < 0.3 * len(source.model.SerializeToString())
    expected, found = infer(source.model, images.images), infer(model, images.images)
    assert np.abs(found[0] - expected[0]).max() < 0.5 * expected[0].std()
    assert np.abs(found[1] - expected[1]).mean() < 0.05


def test_a_layer_that_is_kept_stays_in_float32_when_it_runs(source, images):
    """ONNX Runtime would quantise it with one scale for all channels: beside a channel of huge weights nothing is left."""
    model = onnx.ModelProto()
    model.CopyFrom(source.model)
    readers = {name: node.op_type for node in model.graph.node for name in node.input}
    rewriter = Rewriter(model, "int8-cpu", calibration=images)
    layers = [node for node in nodes(model, "Conv") if node.name in rewriter.candidates()]
    layer = next(node for node in layers[4:] if readers[node.output[0]] == "Relu")
    for place, level in ((1, 1e4), (2, -1e8)):  # the channel says nothing: what is left of it is cut off by the Relu
        tensor = next(t for t in model.graph.initializer if t.name == layer.input[place])
        value = numpy_helper.to_array(tensor).copy()
        value[0] = level
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    graph = rewriter.rewrite([layer.name]).model
    kept = next(node for node in nodes(graph, "Conv") if node.name == layer.name)
    assert weights(graph, kept).data_type == TensorProto.FLOAT
    session, _ = open_session(Path("int8.onnx"), "cpu", 1, graph.SerializeToString())
    found = np.asarray(session.run(["logits"], {"image": images.images})[0])
    expected = infer(graph, images.images, fuse=False)[0]
    assert np.abs(found - expected).mean() < 0.1 * expected.std()


def test_sums_of_int8_products_do_not_saturate(tmp_path):
    """255 * 127 + 255 * 127 does not fit 16 bits, which is what processors without VNNI add in."""
    ones = {
        "one": np.array(1.0, np.float32),
        "weights": np.full((1, 64, 1, 1), 127, np.int8),
        "scales": np.ones(1, np.float32),
    }
    constants = ones | {"zero": np.array(0, np.uint8), "zeros": np.zeros(1, np.int8), "step": np.array(1e4, np.float32)}
    make = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            make("QuantizeLinear", ["x", "one", "zero"], ["xq"]),
            make("DequantizeLinear", ["xq", "one", "zero"], ["xd"]),
            make("DequantizeLinear", ["weights", "scales", "zeros"], ["wd"], axis=0),
            make("Conv", ["xd", "wd"], ["sum"]),
            make("QuantizeLinear", ["sum", "step", "zero"], ["yq"]),
            make("DequantizeLinear", ["yq", "step", "zero"], ["y"]),
        ],
        "sum",
        [onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 8, 8])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session, _ = open_session(tmp_path / "sum.onnx", "cpu", 1, model.SerializeToString())
    found = np.asarray(session.run(None, {"x": np.full((1, 64, 8, 8), 255, np.float32)})[0])
    assert np.abs(found - 64 * 255 * 127).max() <= 1e4


def test_processors_without_vnni_are_found_out():
    """Asked of the kernels themselves, not of the flags: exact sums at half the speed are only for those that need them."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    exact = platform.machine() != "x86_64" or bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8"})
    assert sums_saturate() is not exact


@pytest.mark.parametrize(("precision", "asked"), [("int8", True), (None, True), ("fp32", False)])
def test_exact_sums_are_asked_for_where_they_would_saturate(exported, monkeypatch, precision, asked):
    """Of graphs that say they are int8 or say nothing, and on such processors alone."""
    key = "session.x64quantprecision"
    monkeypatch.setattr(sessions, "precision_of", lambda path, data=None: precision)
    for saturates in (True, False):
        monkeypatch.setattr(sessions, "sums_saturate", lambda saturates=saturates: saturates)
        options = open_session(exported.path, "cpu", 1, None)[0].get_session_options()
        if asked and saturates:
            assert options.get_session_config_entry(key) == "1"
        else:
            with pytest.raises(RuntimeError, match=key):
                options.get_session_config_entry(key)


def test_int8_for_tensorrt(source, images):
    made = Rewriter(source.model, "int8-tensorrt", calibration=images, quantiser="onnxruntime").rewrite()
    model = made.model
    types = Counter()
    for node in nodes(model, "Conv"):
        tensor = weights(model, node)
        types[tensor.data_type] += 1
        if tensor.data_type == TensorProto.INT8:
            assert np.prod(tensor.dims) >= SMALL_LAYER
    assert set(types) == {TensorProto.INT8, TensorProto.FLOAT16, TensorProto.FLOAT}
    zeros = [t for t in model.graph.initializer if t.name.endswith("_zero_point")]
    assert all(t.data_type == TensorProto.INT8 and not numpy_helper.to_array(t).any() for t in zeros)  # symmetric
    assert made.details["quantised"] == types[TensorProto.INT8] and made.details["rest"] == "fp16"
    expected, found = infer(source.model, images.images), infer(model, images.images)
    assert np.abs(found[1] - expected[1]).mean() < 0.05


def test_fp8(source, images):
    model = Rewriter(source.model, "fp8", calibration=images, quantiser="onnxruntime").rewrite().model
    assert TensorProto.FLOAT8E4M3FN in {weights(model, node).data_type for node in nodes(model, "Conv")}
    expected, found = infer(source.model, images.images), infer(model, images.images, fuse=False)
    assert np.abs(found[0] - expected[0]).mean() < 0.15 * expected[0].std()


@pytest.mark.parametrize("name", ["fp16", "int8-cpu", "int8-tensorrt"])
def test_polygraphy_reads_it(source, images, tmp_path, name):
    path = tmp_path / "low.onnx"
    onnx.save(Rewriter(source.model, name, calibration=images, quantiser="onnxruntime").rewrite().model, path)
    said = subprocess.run(
        [Path(sys.executable).with_name("polygraphy"), "inspect", "model", path, "--show", "layers"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "image [dtype=uint8, shape=('batch', 64, 64, 3)]" in said
    assert "mask [dtype=float32, shape=('batch', 16, 16)]" in said
    assert ("float16" in said) == (name != "int8-cpu") and ("QuantizeLinear" in said) == (name != "fp16")


def test_restored_layers_are_one_step_higher(source, images):
    rewriter = Rewriter(source.model, "int8-tensorrt", calibration=images, quantiser="onnxruntime")
    large, small = rewriter.quantised_layers()[0], rewriter.candidates()[0]
    assert small not in rewriter.quantised_layers()
    model = rewriter.rewrite([large, small]).model
    stored = {node.name: weights(model, node).data_type for node in nodes(model, "Conv")}
    assert (stored[large], stored[small]) == (TensorProto.FLOAT16, TensorProto.FLOAT)


def test_int8_without_images_and_unknown_operators(source):
    with pytest.raises(UsageError, match=r"--precision int8 needs images to calibrate on.*--calib-data"):
        Rewriter(source.model, "int8-tensorrt")
    with pytest.raises(UsageError, match=r"--keep-fp32 Nonsense: the graph has no such operator; it has Add, Cast"):
        Rewriter(source.model, "fp16", keep_ops=["Nonsense"])


def test_the_command_writes_a_graph_that_says_what_it_is(bundle, exported, tmp_path, capsys):
    out = tmp_path / "model.int8.onnx"
    command.main(
        [
            "--model",
            str(bundle.path),
            "--out",
            str(out),
            "--precision",
            "int8-cpu",
            "--calib-images",
            "8",
            "--parity-images",
            "8",
            "--calib-method",
            "minmax",
        ]
    )
    assert "parity on 8 images" in capsys.readouterr().out
    engine = open_engine(out, threads=1)
    manifest = engine.info.manifest
    assert engine.info.precision == "int8" and manifest["precision_details"]["name"] == "int8-cpu"
    assert manifest["calibration"]["images"] == 8
    assert manifest["calibration"]["sha256"] == from_samples(bundle.samples[::2], 8).sha256
    assert manifest["parity"]["images_sha256"] == from_samples(bundle.samples[1::2], 8).sha256, "others than those"
    assert out.stat().st_size < 0.3 * exported.path.stat().st_size
    parity.main(["--model", str(bundle.path), "--engine", str(out), "--images", "2", "--threads", "1"])
    assert "calibrated on 8 images of the bundle's samples, which may be among these" in capsys.readouterr().out
    with pytest.raises(UsageError, match="is int8 already; start from the float32 graph"):
        from_graph(out)
