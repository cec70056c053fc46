"""A session runs where it was asked to, node by node: ONNX Runtime itself moves nodes and whole sessions to the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import session as sessions
from export.gpu import Gpu, gpus
from export.placement import RECORD_PLACEMENT, Placed, check_placement, placements, size_arithmetic, strays
from pipeline.errors import UsageError

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    """A convolution, flattened to a shape that is computed from the batch: half of the nodes are about sizes alone."""
    nodes = [
        helper.make_node("Conv", ["x", "weights"], ["maps"], "conv"),
        helper.make_node("Shape", ["x"], ["sizes"], "shape"),
        helper.make_node("Gather", ["sizes", "first"], ["batch"], "gather"),
        helper.make_node("Concat", ["batch", "rest"], ["flat"], "concat", axis=0),
        helper.make_node("Reshape", ["maps", "flat"], ["y"], "reshape"),
    ]
    constants = {
        "weights": np.ones((4, 3, 1, 1), np.float32), "first": np.array([0]), "rest": np.array([-1])
    }  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "flatten",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 100])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_nodes_that_do_not_run_where_they_should_are_named(model):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(RECORD_PLACEMENT, "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    placed = placements(session)
    assert {node.operator for node in placed} >= {"Conv", "Shape", "Reshape"}
    assert {node.provider for node in placed} == {CPU}
    check_placement(session, CPU, Path("model.onnx"), lambda: model)
    with pytest.raises(UsageError) as raised:  # a session on CUDA in which all fell back
        check_placement(session, CUDA, Path("model.onnx"), lambda: model)
    said = str(raised.value)
    assert f"no kernel on {CUDA} for Conv 'conv', Reshape 'reshape', and runs them on {CPU}" in said
    assert "--provider cpu" in said and "\n" not in said


def test_arithmetic_on_sizes_may_stay_on_the_cpu(model):
    assert size_arithmetic(model) == {"shape", "gather", "concat"}
    shared = [Placed("conv", "Conv", CUDA), Placed("shape", "Shape", CPU), Placed("reshape", "Reshape", CUDA)]
    assert strays(shared, CUDA, size_arithmetic(model)) == []
    assert strays([*shared, Placed("top", "TopK", CPU)], CUDA, {"shape"}) == [Placed("top", "TopK", CPU)]


def test_what_tensorrt_leaves_to_cuda_counts_when_it_is_a_multiplication():
    placed = [Placed("cast", "Cast", CUDA), Placed("conv", "Conv", CUDA), Placed("all", "Conv", TENSORRT)]
    assert strays(placed, TENSORRT, ()) == [Placed("conv", "Conv", CUDA)]
    assert strays([Placed("cast", "Cast", CPU)], TENSORRT, ()) == [Placed("cast", "Cast", CPU)]


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
@pytest.mark.parametrize(
    "provider, complaint",
    [
        ("cuda", f"the provider cuda was asked for, but ONNX Runtime chose {CPU}"),
        ("tensorrt", "cannot load it on the provider tensorrt .Please install TensorRT libraries"),
    ],
)
def test_a_session_that_fell_back_as_a_whole_is_refused(model, monkeypatch, provider, complaint, capfd):
    """Told of a card that is not there, ONNX Runtime makes a session on the CPU and calls that a success."""
    monkeypatch.setattr(sessions, "gpus", lambda: (Gpu("a card", "9.0", "13.0"),))
    with pytest.raises(UsageError, match=complaint):
        sessions.open_session(Path("model.onnx"), provider, 1, model.SerializeToString())
    assert "Falling back" not in capfd.readouterr().out
