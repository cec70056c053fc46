"""ModelOpt in place of ONNX Runtime's quantiser: what it is told, and what is refused.  It is not installed for the tests."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from export import precision, trt
from export.gate_images import GateImages, from_samples
from export.precision import Rewriter, products, use_modelopt
from export.quantise import _restore_activations, quantise, quantised_products
from export.source import Source, from_graph
from pipeline.errors import UsageError, WorkError


@pytest.fixture(scope="module")
def source(exported) -> Source:
    return from_graph(exported.path)


@pytest.fixture(scope="module")
def images(bundle) -> GateImages:
    return from_samples(bundle.samples, 4)


@pytest.fixture
def modelopt(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A ModelOpt that keeps what it is told (``calls``) and writes what ``make`` makes of the graph."""
    fake = SimpleNamespace(calls=[], make=lambda model, _: model)

    def quantize(path: str, *, output_path: str, **options: Any) -> None:
        fake.calls.append(options)
        onnx.save(fake.make(onnx.load(path), options), output_path)

    module = ModuleType("modelopt.onnx.quantization")
    module.quantize = quantize  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("modelopt", "modelopt.onnx"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "modelopt.onnx.quantization", module)
    yield fake


def all_but(rewriter: Rewriter, images: GateImages) -> Callable[[onnx.ModelProto, dict[str, Any]], onnx.ModelProto]:
    """What quantises as the fake is told, and leaves out its first layer, as ModelOpt leaves out what it likes."""

    def make(model: onnx.ModelProto, options: dict[str, Any]) -> onnx.ModelProto:
        # ModelOpt looks for the patterns from the beginning of a name, and for nothing behind them.
        matched = [re.compile(pattern) for pattern in options["nodes_to_exclude"]]
        keep = [node.name for node in model.graph.node if any(pattern.match(node.name) for pattern in matched)]
        ranges = Rewriter(rewriter.model, "int8-tensorrt", calibration=images, quantiser="onnxruntime")._measured()
        return quantise(model, ranges, variant="tensorrt", keep=[*keep, rewriter.quantised_layers()[0]])

    return make


def test_modelopt_leaves_out_the_layers_that_are_named_and_no_others(source, images, modelopt):
    rewriter = Rewriter(source.model, "int8-tensorrt", calibration=images, quantiser="modelopt")
    modelopt.make = all_but(rewriter, images)
    rewritten = rewriter.rewrite()
    (told,) = modelopt.calls
    layers = rewriter.quantised_layers()
    for node in products(source.model):
        excluded = any(re.match(pattern, node.name) for pattern in told["nodes_to_exclude"])
        assert excluded == (node.name not in layers), node.name
    assert told["quantize_mode"] == "int8" and told["calibration_method"] == "max"
    assert rewritten.details["quantiser"] == "modelopt"
    assert rewritten.details["quantised"] == len(layers) - 1 == len(quantised_products(rewritten.model))
    assert rewriter.unrounded(rewritten) is None, "its changes are its own"


def test_a_name_that_begins_another_one_leaves_that_one_in(source, images, modelopt):
    rewriter = Rewriter(source.model, "int8-tensorrt", calibration=images, quantiser="modelopt")
    rewriter.sensitive = {"node_conv2d_1", "a.b"}
    rewriter.rewrite()
    patterns = modelopt.calls[0]["nodes_to_exclude"]
    for name, excluded in (("node_conv2d_1", True), ("node_conv2d_19", False), ("a.b", True), ("axb", False)):
        mine = [pattern for pattern in patterns if re.match(pattern, name)]
        assert bool(mine) == excluded, (name, mine)


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        ("int8-cpu", "minmax", "--quantiser modelopt: it makes int8 and fp8 graphs for TensorRT, no int8-cpu"),
        ("fp16", "minmax", "--quantiser modelopt: it makes int8 and fp8 graphs for TensorRT, no fp16"),
        (
            "int8-tensorrt",
            "percentile",
            "--calib-method percentile: for int8-tensorrt ModelOpt has minmax, entropy only",
        ),
        ("fp8", "entropy", "--calib-method entropy: for fp8 ModelOpt has minmax only"),
    ],
)
def test_what_modelopt_cannot_do_is_refused_before_any_work(
    exported, tmp_path, modelopt, complaint, name, method, said
):
    words = ("--onnx", exported.path, "--quantiser", "modelopt", "--calib-method", method, "--precision")
    assert said in complaint(precision, *words, name, "--out", tmp_path / "low.onnx")
    if name != "int8-cpu":
        wanted = name.removesuffix("-tensorrt")
        assert said in complaint(trt, *words, wanted, "--out", tmp_path / "low.plan", "--backend", "tensorrt-rtx")
    assert not list(tmp_path.iterdir())


def test_by_default_modelopt_is_used_for_what_it_can_do(modelopt):
    assert use_modelopt("int8-tensorrt", "auto", "entropy") and use_modelopt("fp8", "auto", "minmax")
    assert not use_modelopt("int8-tensorrt", "auto", "percentile") and not use_modelopt("int8-cpu", "auto", "minmax")


def test_modelopt_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelopt", None)
    assert not use_modelopt("int8-tensorrt", "auto", "minmax")
    with pytest.raises(UsageError, match=r"--quantiser modelopt: .*install 'nvidia-modelopt\[onnx\]'"):
        use_modelopt("int8-tensorrt", "modelopt", "minmax")


def test_what_modelopt_raises_is_one_line(source, images, modelopt):
    def fail(model: onnx.ModelProto, options: dict[str, Any]) -> onnx.ModelProto:
        raise AssertionError("no such\nnode")

    modelopt.make = fail
    with pytest.raises(WorkError, match=r"ModelOpt cannot quantise the graph to fp8 \(no such node\); use --quantiser"):
        Rewriter(source.model, "fp8", calibration=images, quantiser="modelopt").rewrite()


@pytest.mark.parametrize("bounds, within", [(("low", ""), True), (("", "high"), False), (("low", "high"), False)])
def test_a_clip_with_one_bound_is_put_back_too(bounds, within):
    """ONNX Runtime leaves any Clip to the range behind it; the range is that of the Clip where it lies within its bounds."""
    constants = [numpy_helper.from_array(np.float32(value), name) for name, value in (("low", 0), ("high", 6))]
    clip = helper.make_node("Clip", ["x", *bounds], ["y"], name="clip")
    original = helper.make_model(
        helper.make_graph([helper.make_node("Neg", ["a"], ["x"]), clip], "g", [], [], initializer=constants)
    )
    nodes = [helper.make_node("Neg", ["a"], ["y"])]
    read = _restore_activations(nodes, {"y": (0.0, 9.0)}, original, set())
    assert [node.op_type for node in nodes] == (["Neg", "Clip"] if within else ["Neg"])
    assert read == ({"low"} if within else set())
