"""`open_engine`: one interface for every kind of engine, and one clear line for everything that is none."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from export import session as sessions
from export.engine import default_threads, open_engine
from export.files import file_sha256
from export.gpu import Gpu
from export.manifest import METADATA_KEY
from pipeline.errors import UsageError


def test_both_engines_describe_themselves_and_agree(exported, bundle):
    graph, reference = open_engine(exported.path, threads=1), open_engine(bundle.path, provider="cpu", threads=1)
    assert graph.info.sha256 == file_sha256(exported.path) and reference.info.sha256 == bundle.sha256
    assert graph.info.bundle_sha256 == reference.info.bundle_sha256 == bundle.sha256
    assert (graph.info.kind, reference.info.kind) == ("onnxruntime", "torch")
    for name in ("input_size", "mask_size", "geometry", "class_names", "mean", "std", "precision"):
        assert getattr(graph.info, name) == getattr(reference.info, name)
    for one, two in zip(graph.infer(bundle.samples[:5]), reference.infer(bundle.samples[:5]), strict=True):
        assert one.dtype == two.dtype == np.float32 and one.shape == two.shape
        assert np.abs(one - two).max() < 1e-3


def test_an_onnx_engine_needs_no_torch(exported):
    code = (
        "import sys, numpy as np; from export.engine import open_engine; "
        f"engine = open_engine({str(exported.path)!r}, threads=1); "
        "engine.infer(np.zeros((1, 64, 64, 3), np.uint8)); print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


@pytest.mark.parametrize("images", [np.zeros((1, 32, 64, 3), np.uint8), np.zeros((1, 64, 64, 3), np.float32)])
def test_images_that_do_not_fit_are_refused(exported, images):
    with pytest.raises(ValueError, match=r"takes uint8 images \(N, 64, 64, 3\)"):
        open_engine(exported.path, threads=1).infer(images)


def test_tensors_in_and_out(exported, bundle):
    images = torch.from_numpy(bundle.samples[:3])
    for path in (exported.path, bundle.path):
        engine = open_engine(path, threads=1)
        found, expected = engine.tensors(images), engine.outputs(bundle.samples[:3])
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert np.array_equal(found[name].numpy(), value)
        with pytest.raises(ValueError, match=r"takes uint8 images \(N, 64, 64, 3\), not float32"):
            engine.tensors(images.float())


def test_threads_follow_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert default_threads() >= 1


def damage(path, how: str):
    """Files that are no engine, by name."""
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "foreign":
        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "other", [value], [out])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    elif how == "text":
        path.write_text("not a model")
    else:
        model = onnx.load(path)
        manifest = json.loads(model.metadata_props[0].value)
        manifest |= {"newer": {"format": "onepass-engine/9"}, "misstated": {"mask_size": "x"}, "renamed": {}}[how]
        model.metadata_props[0].value = json.dumps(manifest)
        if how == "renamed":
            for node in model.graph.node:
                node.output[:] = ["saliency" if name == "mask" else name for name in node.output]
            model.graph.output[1].name = "saliency"
        onnx.save(model, path)


@pytest.mark.parametrize(
    "how, complaint",
    [
        ("truncated", "ONNX Runtime cannot load it"),
        ("text", "ONNX Runtime cannot load it"),
        ("foreign", f"ONNX file of something else .no '{METADATA_KEY}'"),
        ("newer", "onepass-engine/9"),
        ("misstated", "wrong at mask_size"),
        ("renamed", "its outputs are .*saliency.*make it again with 'python -m export.onnx --model"),
    ],
)
def test_damaged_and_foreign_files(exported, tmp_path, how, complaint):
    path = tmp_path / "model.onnx"
    path.write_bytes(exported.path.read_bytes())
    damage(path, how)
    with pytest.raises(UsageError, match=complaint) as raised:
        open_engine(path, threads=1)
    assert "\n" not in str(raised.value)


def test_what_is_no_engine_at_all(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="no such engine"):
        open_engine(tmp_path / "nothing.onnx")
    with pytest.raises(UsageError, match="unknown kind of engine"):
        open_engine(tmp_path / "model.bin")
    with pytest.raises(UsageError, match=r"model\.json is missing"):
        open_engine(tmp_path)


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there_is_an_error_and_no_fall_back(exported, bundle, provider):
    for path in (exported.path, bundle.path):
        with pytest.raises(UsageError, match=r"no NVIDIA GPU|runs in torch"):
            open_engine(path, provider=provider)


def test_float32_is_float32_in_onnx_runtime_on_a_gpu(exported, monkeypatch):
    asked = {}

    def session(*_: object, providers: list[tuple[str, dict]], **__: object) -> None:
        asked.update(providers)
        raise RuntimeError("no card")

    monkeypatch.setattr(sessions, "gpus", lambda: (Gpu("NVIDIA L4", "8.9", "13.2"),))
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    for provider in ("cuda", "tensorrt"):
        asked.clear()
        with pytest.raises(UsageError, match="no card"):
            open_engine(exported.path, provider=provider)
        assert asked["CUDAExecutionProvider"] == {"use_tf32": "0"} and asked["CPUExecutionProvider"] == {}


def test_float32_is_float32_in_torch_while_an_engine_runs(bundle, monkeypatch):
    def flags() -> tuple[Any, Any]:
        convolution: Any = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
        return convolution.fp32_precision, torch.backends.cuda.matmul.fp32_precision

    engine, before, seen = open_engine(bundle.path, provider="cpu", threads=1), flags(), []
    assert before[0] == "tf32", "torch's default, without which there is nothing to test"
    engine._graph.register_forward_hook(lambda *_: seen.append(flags()))  # pyright: ignore[reportAttributeAccessIssue]
    engine.infer(bundle.samples[:1])
    assert seen == [before], "a CPU has no other float32"
    monkeypatch.setattr(engine, "_device", torch.device("cuda"))
    for _ in range(2):
        engine._run(torch.from_numpy(bundle.samples[:1]))  # pyright: ignore[reportAttributeAccessIssue]
    assert seen[1:] == [("ieee", "ieee")] * 2 and flags() == before


def test_a_bundles_copies_to_and_from_a_gpu_are_pinned_and_what_is_returned_is_not(bundle, monkeypatch):
    engine, images = open_engine(bundle.path, provider="cpu", threads=1), bundle.samples[:3]
    expected, rooms, empty = engine.outputs(images), [], torch.empty

    def room(*shape, pin_memory=False, **options):
        made = empty(*shape, **options)
        if pin_memory:
            rooms.append(made)
        return made

    def pinned(pixels):
        return SimpleNamespace(to=lambda device, non_blocking: pixels if non_blocking else None)

    monkeypatch.setattr(engine, "_device", torch.device("cuda"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch, "empty", room)
    found = engine.outputs(images)
    assert len(rooms) == 2
    for pinned_one, (name, value) in zip(rooms, found.items(), strict=True):
        assert np.array_equal(value, expected[name]) and np.array_equal(pinned_one.numpy(), value)
        assert not np.shares_memory(pinned_one.numpy(), value)
