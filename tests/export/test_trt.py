"""`export.trt`: real engines built by TensorRT-RTX, without a GPU; and everything that can be wrong with one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from PIL import Image

from export import doctor, parity, trt
from export.build import BuildConfig, check_config, parse_profile
from export.engine import open_engine
from export.files import file_sha256
from export.gpu import Gpu, gpus
from export.graph import GraphConfig
from export.manifest import Manifest, Profile, read_sidecar
from export.plan_engine import check_fit, served
from export.triton import configuration
from pipeline.bundle import Bundle
from pipeline.data.planted import write_planted
from pipeline.errors import UsageError
from serving import batch

without_gpu = pytest.mark.usefixtures("no_card")


def build(source: Bundle | Path, out: Path, *words: object) -> Manifest:
    """An engine of a bundle or a graph, for batches of up to 4, judged on 8 images."""
    start = ["--onnx", source] if isinstance(source, Path) else ["--model", source.path]
    flags = [*start, "--out", out, "--backend", "tensorrt-rtx", "--quantiser", "onnxruntime"]
    trt.main([str(word) for word in (*flags, "--parity-images", 8, "--batch", "1,2,4", *words)])
    return read_sidecar(out)


@pytest.fixture(scope="module")
def engines(bundle, exported, tmp_path_factory):
    """fp32, fp16 and int8 engines of one bundle: path by precision."""
    folder = tmp_path_factory.mktemp("engines")
    for name, source in (("fp32", exported.path), ("fp16", exported.path), ("int8", bundle)):
        build(source, folder / f"{name}.plan", "--precision", name, "--calib-images", 8)
    return {name: folder / f"{name}.plan" for name in ("fp32", "fp16", "int8")}


def test_lower_precision_makes_smaller_engines(engines):
    size = {name: path.stat().st_size for name, path in engines.items()}
    assert size["fp16"] < 0.6 * size["fp32"]
    assert size["int8"] < 0.45 * size["fp32"]


def test_the_manifest_tells_all(engines, bundle):
    path = engines["int8"]
    manifest = read_sidecar(path)
    assert manifest.kind == "tensorrt" and manifest.backend == "tensorrt-rtx"
    assert manifest.engine_sha256 == file_sha256(path)
    assert manifest.onnx_sha256 == file_sha256(path.with_name("int8.plan.onnx"))
    assert manifest.bundle_sha256 == bundle.sha256
    assert manifest.profiles == [Profile(min=1, opt=2, max=4)]
    assert manifest.versions["tensorrt-rtx"] and manifest.build["bytes"] == path.stat().st_size
    assert manifest.calibration is not None and manifest.calibration.images == 8
    assert manifest.parity is not None and manifest.parity.passed
    assert manifest.throughput is not None and set(manifest.throughput["images_per_second"]) == {"1", "2"}
    assert manifest.rebuild.startswith("python -m export.trt --model") and "--precision int8" in manifest.rebuild


@without_gpu
def test_without_a_gpu_the_gate_runs_the_compiled_graph_and_says_so(engines, bundle, capsys, tmp_path):
    report = tmp_path / "r.html"
    parity.main(
        ["--model", str(bundle.path), "--engine", str(engines["fp16"]), "--images", "4", "--report", str(report)]
    )
    assert "no GPU here: judged fp16.plan.onnx" in capsys.readouterr().out
    assert "no GPU here" in report.read_text()


@without_gpu
def test_bf16_is_built_and_emulated(bundle, exported, tmp_path, capsys):
    out = tmp_path / "model.plan"
    manifest = build(exported.path, out, "--precision", "bf16")
    assert manifest.precision == "bf16" and manifest.opset == 22
    assert manifest.parity is not None and manifest.gpu is None
    assert any("no GPU here" in note and "ONNX Runtime" in note for note in manifest.parity.notes)
    assert "bf16 was emulated" in capsys.readouterr().out
    trt.main(["--model", str(bundle.path), "--out", str(out), "--verify-only", "--parity-images", "4"])
    assert "bf16 was emulated" in capsys.readouterr().out
    with pytest.raises(UsageError, match="is bf16, for which ONNX Runtime has kernels on a GPU only"):
        open_engine(tmp_path / "model.plan.onnx")


def test_search_restores_layers_until_the_loss_is_small(make_bundle, tmp_path, capsys):
    bundle, data = make_bundle("timm:test_resnet"), tmp_path / "data"
    write_planted(data, size=72, per_class_train=1, per_class_val=1)
    words = ["--precision", "bf16", "--search", "--max-drop", 0.003, "--parity-data", data]
    manifest = build(bundle, tmp_path / "model.plan", *words)
    said = capsys.readouterr().out
    assert "Pareto front" in said and "mask IoU" in said and ">" in said
    assert manifest.precision_details["restored"]
    assert manifest.parity is not None and manifest.parity.figures["mask_iou"] >= 0.997


def test_flags_are_frozen():
    flags = [option for action in trt.parser()._actions for option in action.option_strings]
    assert flags == [
        "-h", "--help", "--model", "--onnx", "--out", "--precision", "--fp16", "--int8", "--batch", "--backend",
        "--calib-data", "--calib-images", "--calib-method", "--keep-fp32", "--quantiser", "--parity-data",
        "--parity-images", "--max-drop", "--threads", "--report", "--search", "--opset", "--mask-dtype", "--workspace",
        "--opt-level", "--timing-cache", "--version-compatible", "--hardware-compat", "--compute-capability", "--refit",
        "--verify-only", "--triton",
    ]  # fmt: skip


def test_aliases_and_options_of_the_builder(exported, tmp_path, capsys):
    out = tmp_path / "model.plan"
    words = ["--onnx", exported.path, "--out", out, "--fp16", "--batch", "1", "--batch", "2,4,8", "--parity-images", 2]
    words += ["--workspace", 512, "--opt-level", 1, "--compute-capability", "8.6,12.0"]
    words += ["--backend", "tensorrt-rtx", "--report", "--triton", tmp_path / "triton"]
    trt.main([str(word) for word in words])
    manifest = read_sidecar(out)
    assert manifest.precision == "fp16" and manifest.compute_capabilities == ["8.6", "12.0"]
    assert [profile.max for profile in manifest.profiles] == [1, 8]
    assert manifest.build["workspace_mib"] == 512 and manifest.build["opt_level"] == 1
    assert manifest.parity is not None and manifest.parity.against == "onnxruntime fp32"
    assert (tmp_path / "model.plan.parity.html").is_file() and (tmp_path / "model.plan.parity.json").is_file()
    folder = tmp_path / "triton" / "model"
    onnx.checker.check_model(str(folder / "1" / "model.onnx"))
    assert "max_batch_size: 8" in (folder / "config.pbtxt").read_text()
    assert len((folder / "labels.txt").read_text().splitlines()) == 10
    doctor.main([str(folder)])
    assert "serves      model.onnx" in capsys.readouterr().out
    assert 'platform: "tensorrt_plan"' in configuration("model", manifest, plan=True)
    several = manifest.model_copy(update={"profiles": [Profile(min=1, opt=1, max=1), Profile(min=2, opt=4, max=8)]})
    assert 'kind: KIND_GPU profile: [ "0", "1" ]' in configuration("model", several, plan=True)
    assert "profile:" not in configuration("model", several, plan=False), "ONNX Runtime has none"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--batch", "4,2"], "--batch 4,2: give min,opt,max"),
        (["--compute-capability", "9.9"], "--compute-capability 9.9: tensorrt-rtx"),
        (["--hardware-compat", "ampere+"], "--hardware-compat is TensorRT's"),
        (["--version-compatible"], "--version-compatible is TensorRT's"),
        (["--opt-level", "9"], "--opt-level 9"),
        (["--workspace", "0"], "--workspace 0"),
        (["--keep-fp32", "Nonsense"], "--keep-fp32 Nonsense"),
        (["--out", "model.onnx"], "has to end in .plan"),
        (["--parity-images", "0"], "--parity-images 0"),
        (["--parity-data", "s3://bucket/set"], "--parity-data s3://bucket/set: an export reads and writes local files"),
        (["--out", "s3://bucket/model.plan"], "--out s3://bucket/model.plan: an export reads and writes local files"),
        (["--threads", "0"], "--threads 0: use a number from 1 up"),
        (["--max-drop", "nan"], "--max-drop nan: use a share between 0 and 1"),
        (["--calib-images", "-1"], "--calib-images -1"),
        (["--triton", "/dev/null/models"], "cannot write /dev/null/models/model/config.pbtxt"),
        (["--mask-dtype", "uint8"], "--mask-dtype: the graph of --onnx has it already"),
        (["--opset", "18"], "--opset: the graph of --onnx has it already"),
        *([] if gpus() else [(["--refit"], "--refit: tensorrt-rtx builds refittable plans where there is a GPU only")]),
    ],
)
def test_wrong_flags(exported, tmp_path, complaint, words, said):
    flags = ["--onnx", exported.path, "--out", tmp_path / "model.plan", "--backend", "tensorrt-rtx"]
    assert said in complaint(trt, *flags, *words)
    assert not list(tmp_path.iterdir())


def test_an_opset_that_is_none(bundle, tmp_path, complaint):
    assert "--opset 9: use 18 to" in complaint(trt, "--model", bundle.path, "--out", tmp_path / "m.plan", "--opset", 9)


def test_int8_with_neither_data_nor_samples(make_bundle, tmp_path, complaint):
    bare = make_bundle(samples=0)
    line = complaint(trt, "--model", bare.path, "--out", tmp_path / "model.plan", "--int8")
    assert "needs images to calibrate on" in line and "--calib-data" in line


def test_a_graph_that_is_none_of_ours(tmp_path, complaint):
    path = tmp_path / "other.onnx"
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "other",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    assert "is an ONNX file of something else" in complaint(trt, "--onnx", path, "--out", tmp_path / "model.plan")


def test_targets_that_cannot_be_written(bundle, exported, tmp_path, complaint, room_for):
    (tmp_path / "file").write_text("")
    words = ("--onnx", exported.path, "--backend", "tensorrt-rtx", "--parity-images", 2, "--out")
    assert "cannot write" in complaint(trt, *words, tmp_path / "file" / "model.plan")
    with room_for(1 << 20):
        line = complaint(trt, *words, tmp_path / "out" / "model.plan")
    assert "cannot write" in line
    assert list((tmp_path / "out").iterdir()) == []


def copy_of(engine, folder, *suffixes: str):
    for suffix in ("", *suffixes):
        (folder / f"model.plan{suffix}").write_bytes(engine.with_name(engine.name + suffix).read_bytes())
    return folder / "model.plan"


def test_damaged_engines(engines, tmp_path, bundle, complaint):
    alone = copy_of(engines["int8"], tmp_path)
    with pytest.raises(UsageError, match=r"has no manifest model\.plan\.json beside it"):
        open_engine(alone)
    path = copy_of(engines["int8"], tmp_path, ".json")
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(UsageError, match=r"truncated.*rebuild it with 'python -m export\.trt --model .*int8\.plan"):
        open_engine(path)
    assert "truncated" in complaint(parity, "--model", bundle.path, "--engine", path)
    assert "truncated" in complaint(batch, "--engine", path, "--input", tmp_path, "--output", tmp_path / "out")
    path = copy_of(engines["int8"], tmp_path, ".json")
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UsageError, match=r"other bytes.*rebuild it with"):
        open_engine(path)
    path.with_name("model.plan.json").write_text("{")
    with pytest.raises(UsageError, match="is no JSON"):
        open_engine(path)
    assert "is no JSON" in complaint(doctor, path, status=1)


@without_gpu
def test_a_whole_engine_without_a_gpu(engines, tmp_path, bundle, complaint):
    path = copy_of(engines["int8"], tmp_path, ".json")
    with pytest.raises(UsageError, match="needs an NVIDIA GPU"):
        open_engine(path)
    line = complaint(parity, "--model", bundle.path, "--engine", path)
    assert "model.plan.onnx that it was compiled from is not beside it" in line


def test_engines_of_another_version_or_gpu(engines):
    path, manifest = engines["int8"], read_sidecar(engines["int8"])
    version = manifest.versions["tensorrt-rtx"]
    ada = Gpu("NVIDIA L4", "8.9", "13.2")
    check_fit(path, manifest, version, ada)
    with pytest.raises(UsageError, match=r"was built with tensorrt-rtx .*, here is 9\.9; rebuild it here with 'python"):
        check_fit(path, manifest, "9.9", ada)
    bound = manifest.model_copy(update={"compute_capabilities": ["12.0"]})
    with pytest.raises(UsageError, match=r"compute capability 12\.0, NVIDIA L4 has 8\.9; rebuild it here"):
        check_fit(path, bound, version, ada)
    compiled = {"backend": "tensorrt", "gpu": "NVIDIA H200", "versions": {"tensorrt": "11.4.0"}}
    theirs = manifest.model_copy(update=compiled)
    with pytest.raises(UsageError, match="was built on NVIDIA H200, here is NVIDIA L4"):
        check_fit(path, theirs, "11.4.0", ada)
    roaming = {"hardware_compatibility": "ampere+", "version_compatible": True}
    check_fit(path, theirs.model_copy(update={"build": manifest.build | roaming}), "11.5.0", ada)


def test_a_plan_of_another_version_ends_a_batch_job_in_one_line(engines, tmp_path):
    path = copy_of(engines["int8"], tmp_path, ".json")
    sidecar = path.with_name("model.plan.json")
    manifest = read_sidecar(path)
    newer = manifest.model_copy(update={"versions": manifest.versions | {"tensorrt-rtx": "99.1.0"}})
    sidecar.write_text(newer.model_dump_json())
    (tmp_path / "in").mkdir()
    Image.new("RGB", (80, 60)).save(tmp_path / "in" / "a.png")
    command = [sys.executable, "-m", "serving.batch", "--engine", path, "--input", tmp_path / "in"]
    done = subprocess.run([*command, "--output", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    said = done.stderr.replace("\r", "\n").splitlines()  # the progress bar stands before it
    assert "was built with tensorrt-rtx 99.1.0, here is" in said[-1] and "rebuild it here with" in said[-1]
    assert not any("Traceback" in line or "ray." in line for line in said)
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_tensorrt_itself_wants_a_gpu(tmp_path, complaint, exported):
    words = ("--onnx", exported.path, "--out", tmp_path / "model.plan", "--backend", "tensorrt")
    if not gpus():
        line = complaint(trt, *words)
        assert "tensorrt cannot be imported" in line or "tensorrt builds on the GPU" in line


@pytest.mark.parametrize(
    "name, options, precisions",
    [
        ("timm:convnext_atto", {}, ("int8",)),
        ("timm:vit_tiny_patch16_224", {"arguments": {"img_size": 64, "depth": 2}}, ("fp16", "fp8")),
    ],
)
def test_every_kind_of_backbone_in_low_precision(export_of, tmp_path, name, options, precisions):
    made = export_of(name, **options)
    write_planted(tmp_path / "data", size=72, per_class_train=2, per_class_val=1)
    for precision in precisions:
        words = ["--precision", precision, "--calib-data", tmp_path / "data", "--calib-images", 16]
        manifest = build(made.path, tmp_path / f"{precision}.plan", *words)  # raises unless the gate passes
        if manifest.calibration is not None:
            assert manifest.calibration.source == str(tmp_path / "data") and manifest.calibration.images == 16


def test_byte_masks_in_int8(make_bundle, tmp_path):
    bundle = make_bundle("timm:test_resnet", samples=8)
    manifest = build(bundle, tmp_path / "model.plan", "--int8", "--mask-dtype", "uint8")
    assert {port.name: port.dtype for port in manifest.outputs} == {"logits": "float32", "mask": "uint8"}
    assert manifest.options == {"mask_dtype": "uint8"}
    assert manifest.parity is not None and manifest.parity.passed


@pytest.mark.parametrize(
    "config, options, further",
    [
        (GraphConfig(upsampled=True), {}, {"mask_upsampled"}),
        (GraphConfig(topk=3), {"class_conditional": True}, {"topk_labels", "topk_masks"}),
        (GraphConfig(target_area=0.2), {"target_area": True}, set()),
    ],
    ids=["upsampled", "topk", "target-area"],
)
def test_every_kind_of_graph_becomes_an_engine(export_of, tmp_path, config, options, further):
    made = export_of("timm:test_resnet", config, **options)
    manifest = build(made.path, tmp_path / "model.plan", "--fp16")
    assert manifest.outputs == made.manifest.outputs and manifest.options == made.manifest.options
    assert {port.name for port in manifest.outputs} == {"logits", "mask"} | further
    assert manifest.parity is not None and manifest.parity.passed
    assert set(manifest.parity.figures["outputs"]) == further - {"topk_labels"}


def test_batches_that_no_profile_covers_are_filled_up():
    profiles = [Profile(min=1, opt=1, max=1), Profile(min=4, opt=8, max=16)]
    assert [served(profiles, batch) for batch in (1, 2, 4, 5, 16)] == [1, 4, 4, 5, 16]


def test_profiles():
    assert parse_profile("1,64,256") == Profile(min=1, opt=64, max=256)
    assert parse_profile("8") == Profile(min=8, opt=8, max=8)
    for wrong in ("", "a", "0,1,2", "3,2,1", "1,2,3,4"):
        with pytest.raises(UsageError, match="--batch"):
            parse_profile(wrong)


def test_the_doctor_explains_every_artefact(engines, exported, bundle, tmp_path, capsys, complaint):
    doctor.main([str(exported.path)])
    said = capsys.readouterr().out
    assert "an ONNX file" in said and "opset       onnx 20" in said and "usable here" in said
    doctor.main([str(bundle.path)])
    assert "torchvision:resnet18, 10 classes" in capsys.readouterr().out
    lines, trouble = doctor.examine(Path(f"{engines['int8']}.json"))
    said = "\n".join(lines)
    assert "calibrated  on 8 images" in said and "tensorrt-rtx" in said and "parity      passed" in said
    assert doctor.examine(engines["int8"])[1] == trouble, "the manifest is judged by its engine"
    if not gpus():
        assert "needs an NVIDIA GPU" in complaint(doctor, engines["int8"], status=1)
    (tmp_path / "notes.txt").write_text("")
    assert "nothing that this project writes" in complaint(doctor, tmp_path / "notes.txt", status=1)
    assert "no such file" in complaint(doctor, tmp_path / "missing.onnx")


def test_the_doctor_explains_what_lies_around_an_engine(bundle, exported, tmp_path, capsys, complaint):
    def said(path) -> str:
        doctor.main([str(path)])
        return capsys.readouterr().out

    run = tmp_path / "run"
    run.mkdir()
    (run / "bundle").symlink_to(bundle.path)
    assert "a training run" in said(run) and "classifier  torchvision:resnet18" in said(run)
    assert "give the folder that it lies in" in complaint(doctor, bundle.path / "samples.safetensors", status=1)
    report = tmp_path / "m.parity.html"
    words = ["--model", bundle.path, "--engine", exported.path, "--images", 2, "--report", report]
    parity.main([str(word) for word in words])
    capsys.readouterr()
    assert "a parity report" in said(report) and "verdict     passed" in said(tmp_path / "m.parity.json")
    record = json.loads((tmp_path / "m.parity.json").read_text())
    (tmp_path / "m.parity.json").write_text(json.dumps(record | {"passed": False}))
    assert "failed the parity gate; see m.parity.html" in complaint(doctor, tmp_path / "m.parity.json", status=1)
    (tmp_path / "m.parity.json").write_text("[]")
    assert "is no parity report" in complaint(doctor, tmp_path / "m.parity.json", status=1)
    (tmp_path / "config.pbtxt").write_text("")
    assert "holds no model" in complaint(doctor, tmp_path, status=1)


def test_impossible_settings_are_refused_before_any_work():
    from export.backend import load_backend

    config = BuildConfig(profiles=(Profile(min=1, opt=1, max=1),), hardware_compatibility="same_cc")
    with pytest.raises(UsageError, match="use --compute-capability"):
        check_config(config, load_backend("tensorrt-rtx"))


def test_manifests_are_json_with_a_frozen_set_of_keys(engines):
    fields = json.loads(engines["fp32"].with_name("fp32.plan.json").read_text())
    assert set(fields) == set(Manifest.model_fields)
    assert set(fields["build"]) == {
        "bytes", "seconds", "layers", "workspace_mib", "opt_level", "version_compatible", "hardware_compatibility",
        "refit", "notes",
    }  # fmt: skip
