"""`export.onnx`: the file's public surface, every kind of backbone, and what happens when it cannot be written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from export import onnx as command
from export.engine import open_engine
from export.graph import GraphConfig
from export.manifest import METADATA_KEY, Manifest
from export.onnx import export_onnx
from export.tidy import scale_for
from export.torch_engine import TorchEngine
from pipeline.presets import PRESETS
from pipeline.spec import MaskerSpec


def ports(values) -> list[tuple[str, int, list[int | str]]]:
    return [
        (v.name, v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in values
    ]


def test_names_shapes_and_metadata_are_frozen(exported, bundle):
    model = onnx.load(exported.path)
    onnx.checker.check_model(model, full_check=True)
    assert ports(model.graph.input) == [("image", onnx.TensorProto.UINT8, ["batch", 64, 64, 3])]
    assert ports(model.graph.output) == [
        ("logits", onnx.TensorProto.FLOAT, ["batch", 10]),
        ("mask", onnx.TensorProto.FLOAT, ["batch", 16, 16]),
    ]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert [entry.key for entry in model.metadata_props] == [METADATA_KEY]
    manifest = Manifest.model_validate_json(model.metadata_props[0].value)
    assert manifest == exported.manifest
    assert set(json.loads(model.metadata_props[0].value)) == {
        "format", "kind", "created", "preset", "architecture", "bundle_sha256", "onnx_sha256", "engine_sha256",
        "inputs", "outputs", "opset", "input_size", "mask_size", "geometry", "mean", "std", "class_names",
        "mask_values", "data_classes", "class_index", "mask_statistics", "precision", "precision_details", "calibration",
        "options", "backend", "profiles", "build", "gpu", "compute_capabilities", "versions", "parity", "throughput", "rebuild",
    }  # fmt: skip
    assert manifest.bundle_sha256 == bundle.sha256
    assert manifest.parity is not None and manifest.parity.passed
    assert manifest.throughput is not None and set(manifest.throughput["images_per_second"]) == {"1", "8"}


def test_the_graph_is_lean(exported):
    model = onnx.load(exported.path)
    assert model.graph.node[0].op_type == "Cast"  # TensorRT takes uint8 into nothing else
    assert set(Counter(node.op_type for node in model.graph.node)) == {
        "Cast", "Transpose", "Mul", "Add", "Conv", "Relu", "MaxPool", "ReduceMean", "Reshape", "Gemm", "Resize",
        "Sigmoid", "Squeeze",
    }  # fmt: skip
    text = exported.path.read_bytes()
    assert b"site-packages" not in text and str(exported.path.parent).encode() not in text.replace(
        exported.manifest.rebuild.encode(), b""
    )


def test_polygraphy_reads_it(exported):
    said = subprocess.run(
        [Path(sys.executable).with_name("polygraphy"), "inspect", "model", exported.path],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "image [dtype=uint8, shape=('batch', 64, 64, 3)]" in said
    assert "mask [dtype=float32, shape=('batch', 16, 16)]" in said


def test_torch_agrees_at_any_batch_size_and_place(exported, bundle):
    engine, reference = open_engine(exported.path, provider="cpu", threads=1), TorchEngine(bundle.path, bundle=bundle)
    logits, mask = engine.infer(bundle.samples)
    expected_logits, expected_mask = reference.infer(bundle.samples)
    assert np.array_equal(logits.argmax(1), expected_logits.argmax(1))
    assert np.abs(mask - expected_mask).mean() < 1e-5
    batch = np.concatenate([bundle.samples] * 3)[:64]
    inside_logits, inside_mask = engine.infer(batch)
    for index in (0, 5, 23, 63):
        alone_logits, alone_mask = engine.infer(batch[index : index + 1])
        assert np.array_equal(alone_logits[0], inside_logits[index])
        assert np.array_equal(alone_mask[0], inside_mask[index])


VIT = {"arguments": {"img_size": 64, "depth": 2}}
EXPORTED = [
    ("timm:convnext_atto", None, {}),
    ("timm:vit_tiny_patch16_224", None, VIT),
    ("timm:mobilenetv2_100", None, {"arguments": {"pad_type": "same"}}),
    ("resnet18", None, {"concrete": {"mode": "hard", "shown": "mode"}}),
    ("resnet18", None, {"layers": (0, 1, 2, 3, 4)}),
    ("resnet18", None, {"concrete": {"mode": "soft", "temperature": 0.2}}),
    ("resnet18", GraphConfig(topk=3), {"class_conditional": True}),
    (
        "resnet18",
        GraphConfig(target_area=0.2, upsampled=True),
        {"target_area": True, "upsampling": "bilinear"},
    ),
]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_presets_masker_is_among_those_that_are_exported(preset):
    known = MaskerSpec.model_fields
    assert PRESETS[preset].masker in [
        MaskerSpec(**{name: value for name, value in options.items() if name in known}) for *_, options in EXPORTED
    ]


@pytest.mark.parametrize("name, config, options", EXPORTED)
def test_every_kind_of_backbone_and_masker(export_of, name, config, options):
    made = export_of(name, config, **options)  # raises unless the gate passes
    assert made.manifest.parity.figures["top1_agreement"] == 1
    counts = Counter(node.op_type for node in onnx.load(made.path).graph.node)
    assert counts["Shape"] <= 1  # a class token and a wanted area have to be repeated over the batch
    judged = made.manifest.parity.figures["outputs"]  # what there is beside logits and native mask
    assert set(judged) == set((config or GraphConfig()).output_names) - {"logits", "mask", "topk_labels"}
    assert 0 <= max(judged.values(), default=0) < 1e-3


def test_options_of_the_graph(make_bundle, tmp_path):
    made = make_bundle(samples=4)
    config = GraphConfig(mask_dtype="uint8", upsampled=True, resize=True)
    judged = export_onnx(made, tmp_path / "model.onnx", config=config).parity
    assert judged.figures["sizes"].keys() == {"64x123", "97x64", "131x73"}
    engine = open_engine(tmp_path / "model.onnx", threads=1)
    images = np.random.default_rng(0).integers(0, 256, (3, 80, 50, 3), dtype=np.uint8)
    found = engine.outputs(images)
    assert found["mask"].shape == (3, 16, 16) and found["mask"].dtype == np.uint8
    assert found["mask_upsampled"].shape == (3, 64, 64)
    assert np.array_equal(engine.infer(images)[1], found["mask"].astype(np.float32) / 255)


def test_the_network_at_any_size(make_bundle, tmp_path):
    made = make_bundle(samples=2)
    judged = export_onnx(made, tmp_path / "model.onnx", config=GraphConfig(dynamic_size=True)).parity
    assert 0 < max(apart["mask_max_abs"] for apart in judged.figures["sizes"].values()) < 1e-3
    engine = open_engine(tmp_path / "model.onnx", threads=1)
    logits, mask = engine.infer(np.zeros((2, 96, 128, 3), dtype=np.uint8))
    assert logits.shape == (2, 10) and mask.shape == (2, 16, 16)


@pytest.mark.parametrize("source, target", [(7, 56), (14, 56), (3, 16), (5, 13), (7, 25), (12, 24), (9, 31), (49, 50)])
def test_scales_of_resizes_round_down_to_the_right_size(source, target):
    scale = scale_for(source, target)
    assert int(np.floor(np.float32(source) * np.float32(scale))) == target
    assert abs(scale - target / source) < 1e-6 * target / source


def test_flags_are_frozen():
    flags = [option for action in command.parser()._actions for option in action.option_strings]
    assert flags == [
        "-h", "--help", "--model", "--out", "--opset", "--mask-dtype", "--upsampled", "--topk", "--target-area",
        "--resize", "--dynamic-size", "--parity-data", "--parity-images", "--max-drop", "--threads", "--report",
    ]  # fmt: skip


def test_a_bundle_that_misses_a_file(bundle, tmp_path, complaint):
    broken = tmp_path / "bundle"
    broken.mkdir()
    (broken / "model.json").write_bytes((bundle.path / "model.json").read_bytes())
    line = complaint(command, "--model", broken, "--out", tmp_path / "model.onnx")
    assert "model.safetensors is missing" in line


def test_a_target_that_cannot_be_written(bundle, tmp_path, complaint):
    (tmp_path / "file").write_text("")
    line = complaint(command, "--model", bundle.path, "--out", tmp_path / "file" / "model.onnx")
    assert "cannot write" in line and "--out" in line


def test_a_full_disk_leaves_nothing_behind(bundle, tmp_path, complaint, room_for):
    out = tmp_path / "out" / "model.onnx"
    with room_for(1 << 20):
        line = complaint(command, "--model", bundle.path, "--out", out)
    assert "cannot write" in line
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("words", [["--out", "model.pb"], ["--out", "model.onnx", "--opset", "9"]])
def test_a_wrong_name_or_opset(bundle, tmp_path, complaint, words):
    assert f"--{'opset' if '--opset' in words else 'out'}" in complaint(
        command, "--model", bundle.path, "--out", tmp_path / words[1], *words[2:]
    )


def test_a_backbone_that_works_at_one_size_only(export_of, tmp_path, complaint):
    made = export_of("timm:vit_tiny_patch16_224", **VIT).bundle
    line = complaint(command, "--model", made.path, "--out", tmp_path / "model.onnx", "--dynamic-size")
    assert "vit_tiny_patch16_224 cannot be exported" in line and "leave --dynamic-size out" in line
