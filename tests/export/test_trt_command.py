"""`export.trt` on machines with a card, as far as that can be shown without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from export import trt
from export.backend import Backend
from export.build import Built
from export.engine import OnnxEngine
from export.gpu import Gpu
from export.judged import Judging, serialise
from export.manifest import Manifest, read_sidecar
from export.precision import Rewriter
from export.source import from_graph
from pipeline.errors import UsageError


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """The card that `export.trt` sees."""
    found = Gpu("NVIDIA L4", "8.9", "13.2")
    monkeypatch.setattr("export.gpu.gpus", lambda: (found,))
    return found


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("capabilities", [[], ["8.6", "8.9"], ["12.0"]])
def test_a_plan_for_another_card_is_judged_by_its_graph(exported, monkeypatch, capabilities):
    source = from_graph(exported.path)
    rewritten = Rewriter(source.model, "bf16").rewrite()
    manifest = source.describe(rewritten, None, "minmax", rebuild="")
    manifest = manifest.model_copy(update={"compute_capabilities": capabilities})
    graph, built = serialise(rewritten.model, manifest), Built(plan=b"", seconds=0.0, layers=0, notes=())
    monkeypatch.setattr("export.plan_engine.PlanEngine", lambda *_, **__: "the plan")
    engine, notes = trt.open_built(Path("model.plan"), graph, built, rewritten, manifest, Judging(threads=1))
    if capabilities != ["12.0"]:
        assert engine == "the plan" and notes == [], "bf16 was not emulated"
        return
    assert isinstance(engine, OnnxEngine) and "bf16 was emulated" in notes[0]
    assert notes[1:] == [
        "model.plan was built for other cards than the NVIDIA L4 here, so it was not run: judged an emulation of its "
        "graph, in ONNX Runtime on the CPU"
    ]


@pytest.mark.usefixtures("card")
def test_what_ran_on_a_card_was_not_emulated(exported, tmp_path, monkeypatch):
    class Plan(OnnxEngine):
        """Answers as the float32 graph does."""

        def __init__(self, path: Path, *, manifest: Manifest, plan: bytes) -> None:
            super().__init__(exported.path, provider="cpu", threads=1)
            self.info = replace(self.info, path=str(path), kind="tensorrt", precision="bf16", max_batch=4)

    monkeypatch.setattr("export.plan_engine.PlanEngine", Plan)
    monkeypatch.setattr("export.throughput.measured", lambda *_, **__: {"on": "NVIDIA L4"})
    words = [
        "--onnx",
        exported.path,
        "--out",
        tmp_path / "model.plan",
        "--backend",
        "tensorrt-rtx",
        "--precision",
        "bf16",
    ]
    trt.main([str(word) for word in (*words, "--threads", 1, "--parity-images", 2, "--batch", "1,2,4")])
    manifest = read_sidecar(tmp_path / "model.plan")
    assert manifest.parity is not None and manifest.parity.ran_on == "tensorrt cpu"
    assert manifest.parity.notes == ["no bundle was at hand, so model.onnx itself was taken for right"]


@pytest.mark.parametrize("option", ["resize", "dynamic_size"])
def test_a_graph_of_any_size_is_refused_before_any_work(exported, tmp_path, monkeypatch, option):
    source = from_graph(exported.path)
    options = {**source.manifest.options, option: True}
    other = replace(source, manifest=source.manifest.model_copy(update={"options": options}))
    monkeypatch.setattr("export.source.open_source", lambda *_, **__: other)
    flag = option.replace("_", "-")
    with pytest.raises(UsageError, match=rf"takes images of any size.*export it without --{flag}$"):
        trt.main(["--onnx", str(exported.path), "--out", str(tmp_path / "m.plan")])
    assert list(tmp_path.iterdir()) == []


def test_gaps_that_triton_cannot_fill_are_refused_before_any_work(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("export.backend.load_backend", lambda *_: Backend("tensorrt", None, "10.13", None))
    monkeypatch.setattr("export.build.check_config", lambda *_: None)
    words = ["--onnx", str(exported.path), "--out", str(tmp_path / "m.plan"), "--batch", "4,8,16"]
    with pytest.raises(UsageError, match="no profile takes a batch of 1"):
        trt.main([*words, "--triton", str(tmp_path / "triton")])
    assert list(tmp_path.iterdir()) == []
