"""`export.precision --search`: layers restored until the explanation is whole, and the table."""

from __future__ import annotations

import pytest

from export import precision
from export.engine import open_engine


@pytest.fixture(scope="module")
def small(make_bundle):
    return make_bundle("timm:test_resnet")


def test_layers_of_an_int8_graph_are_restored(small, tmp_path, monkeypatch, capsys):
    for module in ("search", "throughput"):
        monkeypatch.setattr(f"export.{module}.images_per_second", lambda *_, **__: 1.0)  # which takes a second each
    out = tmp_path / "low.onnx"
    words = ["--model", small.path, "--precision", "int8-cpu", "--out", out, "--threads", 1, "--parity-images", 8]
    precision.main([str(word) for word in (*words, "--search", "--max-drop", 0.005)])
    said = capsys.readouterr().out
    assert "search for a loss of at most 0.005" in said and "Pareto front" in said and "  > " in said
    manifest = open_engine(out, threads=1).info.manifest
    assert manifest["precision_details"]["restored"] and manifest["parity"]["figures"]["mask_iou"] >= 0.995


def test_flags_are_frozen():
    flags = [option for action in precision.parser()._actions for option in action.option_strings]
    assert flags == [
        "-h", "--help", "--model", "--onnx", "--out", "--precision", "--calib-data", "--calib-images", "--calib-method",
        "--keep-fp32", "--quantiser", "--parity-data", "--parity-images", "--max-drop", "--threads", "--report", "--search",
    ]  # fmt: skip
