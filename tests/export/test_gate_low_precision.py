"""The five saboteurs at a low precision, whose limits are wider than what they do: before the rewriting, and after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx
import pytest

from export import precision, trt
from export.gate import ParityFailure
from export.gate_images import from_samples
from export.judged import Judging, check_rewriting
from export.precision import Name, Rewriter, Rewritten
from export.source import Source, from_graph
from tests.export._saboteurs import SABOTEURS, wrong_mean


@pytest.mark.parametrize("name", SABOTEURS)
@pytest.mark.parametrize(("exporter", "out"), [((trt, "fp16"), "low.plan"), ((precision, "int8-cpu"), "low.onnx")])
def test_saboteurs_of_the_float32_graph_do_not_hide_behind_a_low_precision(
    exported, bundle, tmp_path, monkeypatch, complaint, exporter, out, name
):
    model = onnx.load(exported.path)
    SABOTEURS[name][0](model)
    monkeypatch.setattr("export.trace.trace", lambda *_: model)
    command, kind = exporter
    words = ("--model", bundle.path, "--out", tmp_path / out, "--threads", 1, "--precision", kind)
    assert "the float32 graph to start from fails the parity gate" in complaint(command, *words, status=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("exporter", "out"), [((trt, "int8"), "low.plan"), ((precision, "int8-cpu"), "low.onnx")])
def test_nothing_is_written_where_the_rewriting_goes_wrong(
    exported, bundle, tmp_path, monkeypatch, complaint, exporter, out
):
    def wrongly(self: Rewriter) -> Rewritten:
        rewritten = rewrite(self)
        wrong_mean(rewritten.model)
        return rewritten

    rewrite = Rewriter.rewrite
    monkeypatch.setattr("export.trace.trace", lambda *_: onnx.load(exported.path))
    monkeypatch.setattr(Rewriter, "rewrite", wrongly)
    command, kind = exporter
    words = ("--model", bundle.path, "--out", tmp_path / out, "--threads", 1, "--calib-images", 4, "--precision", kind)
    assert "graph, without its rounding, fails the parity gate: logits_" in complaint(command, *words, status=1)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def rewrite(exported, bundle) -> Callable[[Name], tuple[Source, Rewriter, Rewritten]]:
    """What `export.precision` makes of `bundle` in a precision, before the gate."""
    source = replace(from_graph(exported.path), path=bundle.path, bundle=bundle)

    def rewritten(name: Name) -> tuple[Source, Rewriter, Rewritten]:
        calibration = from_samples(bundle.samples, 8)
        rewriter = Rewriter(source.model, name, calibration=calibration, quantiser="onnxruntime")
        return source, rewriter, rewriter.rewrite()

    return rewritten


@pytest.mark.parametrize("kind", ["fp16", "int8-cpu"])
def test_saboteurs_of_a_rewritten_graph_are_caught(rewrite, kind):
    """Held to float32's limits but for its rounding.

    By its values alone an int8 graph with a layer scaled by 1.05 or a wrong mean cannot be told from an honest one: its
    mean logits move by 0.021 to 0.036 of their deviation, an honest one's by 0.017, where float32's limit is 0.0002.
    """
    source, rewriter, rewritten = rewrite(kind)
    judging = Judging(threads=1)
    assert check_rewriting(rewriter, rewritten, source, judging) == []
    for name, (sabotage, error) in SABOTEURS.items():
        model = onnx.ModelProto()
        model.CopyFrom(rewritten.model)
        sabotage(model)
        with pytest.raises(ParityFailure, match="without its rounding, fails the parity gate") as caught:
            check_rewriting(rewriter, replace(rewritten, model=model), source, judging)
        assert any(isinstance(found, error) for found in caught.value.errors), name


@pytest.mark.parametrize("kind", ["bf16", "int8-tensorrt", "fp8"])
def test_without_its_rounding_a_graph_is_the_one_that_it_was_made_from(rewrite, kind):
    source, rewriter, rewritten = rewrite(kind)
    assert check_rewriting(rewriter, rewritten, source, Judging(threads=1)) == []
