"""`export.triton`: what Triton is told, read by the grammar of its configuration, and folders that are whole or not there."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from export import doctor, triton
from export.manifest import Manifest, Port, Profile
from export.triton import configuration, write_model_folder
from pipeline.errors import UsageError

TOKEN = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"|([A-Za-z_]\w*)|(-?\d+(?:\.\d+)?)|([{}\[\]:,]))')


def parsed(text: str) -> dict[str, list[Any]]:
    """A message in protobuf's text format: every field with all its values, in order."""
    tokens, place = [], 0
    while text[place:].strip():
        found = TOKEN.match(text, place)
        assert found, f"no token at {text[place : place + 30]!r}"
        tokens.append(found)
        place = found.end()
    tokens.reverse()

    def value() -> Any:
        string, word, number, mark = tokens.pop().groups()
        assert mark in (None, "{"), mark
        if mark:
            return message("}")
        return string if string is not None else word or float(number)

    def message(end: str | None) -> dict[str, list[Any]]:
        fields: defaultdict[str, list[Any]] = defaultdict(list)
        while tokens and (end is None or tokens[-1][4] != end):
            name = tokens.pop()[2]
            assert name, "a field has a name"
            colon = tokens[-1][4] == ":"
            if colon:
                tokens.pop()
            if tokens[-1][4] == "[":
                tokens.pop()
                while tokens[-1][4] != "]":
                    fields[name].append(value())
                    if tokens[-1][4] == ",":
                        tokens.pop()
                        assert tokens[-1][4] != "]", "nothing follows the comma"
                tokens.pop()
            else:
                assert colon or tokens[-1][4] == "{", f"{name} has no value"
                fields[name].append(value())
        if end is not None:
            assert tokens.pop()[4] == end
        return dict(fields)

    return message(None)


@pytest.fixture
def plan(exported) -> Manifest:
    """The manifest of a plan of TensorRT proper."""
    profiles = [Profile(min=1, opt=2, max=4), Profile(min=5, opt=8, max=16)]
    ports = [*exported.manifest.outputs, Port(name="topk_labels", dtype="int64", shape=["batch", 2])]
    made = {"kind": "tensorrt", "backend": "tensorrt", "profiles": profiles, "outputs": ports}
    return exported.manifest.model_copy(update=made)


@pytest.fixture
def engine(exported, tmp_path) -> Path:
    """A file in a plan's place, and the graph beside it."""
    (tmp_path / "model.plan").write_bytes(b"plan")
    shutil.copyfile(exported.path, tmp_path / "model.plan.onnx")
    return tmp_path / "model.plan"


def test_a_plan_is_described_port_by_port(plan):
    said = parsed(configuration("model", plan, plan=True))
    assert said["name"] == ["model"] and said["platform"] == ["tensorrt_plan"] and said["max_batch_size"] == [16]
    assert said["input"] == [{"name": ["image"], "data_type": ["TYPE_UINT8"], "dims": [64, 64, 3]}]
    assert said["output"] == [
        {"name": ["logits"], "data_type": ["TYPE_FP32"], "dims": [10], "label_filename": ["labels.txt"]},
        {"name": ["mask"], "data_type": ["TYPE_FP32"], "dims": [16, 16]},
        {"name": ["topk_labels"], "data_type": ["TYPE_INT64"], "dims": [2]},
    ]
    assert said["instance_group"] == [{"count": [1], "kind": ["KIND_GPU"], "profile": ["0", "1"]}]
    assert said["dynamic_batching"][0]["preferred_batch_size"] == [2, 8]
    (warm,) = said["model_warmup"]
    assert warm["batch_size"] == [2]
    assert warm["inputs"][0]["value"] == [{"data_type": ["TYPE_UINT8"], "dims": [64, 64, 3], "zero_data": ["true"]}]
    assert "optimization" not in said


@pytest.mark.parametrize("precision, levels", [("fp32", None), ("fp16", None), ("int8", [2]), ("fp8", [2])])
def test_onnx_runtime_gets_the_options_of_a_session(plan, precision, levels):
    manifest = plan.model_copy(update={"precision": precision})
    (said,) = parsed(configuration("model", manifest, plan=False))["optimization"]
    assert said.get("graph") == (levels and [{"level": levels}])
    (accelerators,) = said["execution_accelerators"]
    assert accelerators["gpu_execution_accelerator"] == [
        {"name": ["cuda"], "parameters": [{"key": ["use_tf32"], "value": ["0"]}]}
    ]


@pytest.mark.parametrize(
    "profiles, first", [([(4, 8, 16)], 1), ([(1, 1, 1), (4, 8, 16)], 2), ([(1, 2, 4), (4, 8, 16)], None)]
)
def test_batches_that_triton_could_not_serve(plan, engine, tmp_path, profiles, first):
    sizes = [Profile(min=least, opt=best, max=most) for least, best, most in profiles]
    manifest = plan.model_copy(update={"profiles": sizes})
    if first is None:
        write_model_folder(tmp_path / "models", engine, manifest)
        return
    with pytest.raises(
        UsageError, match=rf"--triton: no profile takes a batch of {first},.*--batch 1,{sizes[0].opt},16"
    ):
        write_model_folder(tmp_path / "models", engine, manifest)
    assert not (tmp_path / "models").exists()
    graph = manifest.model_copy(update={"backend": "tensorrt-rtx"})
    write_model_folder(tmp_path / "models", engine, graph)  # ONNX Runtime takes any batch


def test_a_folder_is_replaced_whole(plan, engine, exported, tmp_path):
    repository = tmp_path / "models"
    folder = write_model_folder(repository, engine, plan.model_copy(update={"backend": "tensorrt-rtx"}))
    assert sorted(path.name for path in folder.rglob("*")) == ["1", "config.pbtxt", "labels.txt", "model.onnx"]
    assert (folder / "1" / "model.onnx").read_bytes() == exported.path.read_bytes()
    write_model_folder(repository, engine, plan)
    assert sorted(path.name for path in (folder / "1").iterdir()) == ["model.plan", "model.plan.json"]
    assert [path.name for path in repository.iterdir()] == ["model"]


def test_what_a_killed_export_left_goes_and_what_others_wrote_stays(plan, engine, tmp_path):
    """A server that looks into the repository sees no second model, and no version but 1, at any moment."""
    repository = tmp_path / "models"
    folder = write_model_folder(repository, engine, plan)
    left = folder / f"{triton._STAGING}0123"
    (left / "1").mkdir(parents=True)
    (left / "1" / "model.plan").write_bytes(b"half")
    write_model_folder(repository, engine, plan)
    assert not left.exists() and not list(folder.glob(".*"))
    (folder / "2").mkdir()
    with pytest.raises(UsageError, match="holds 2, which is none of ours"):
        write_model_folder(repository, engine, plan)


def test_a_folder_that_cannot_be_written_stays_as_it_was(plan, engine, tmp_path, monkeypatch):
    repository = tmp_path / "models"
    folder = write_model_folder(repository, engine, plan)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(name: str, manifest: Manifest, *, plan: bool) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(triton, "configuration", full)
    engine.write_bytes(b"another plan")
    with pytest.raises(UsageError, match=r"cannot write .*/models/model: No space left on device; give --triton a"):
        write_model_folder(repository, engine, plan)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in repository.iterdir()] == ["model"]


def test_files_of_others_are_not_removed(plan, engine, tmp_path):
    other = tmp_path / "models" / "model" / "2" / "model.plan"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"theirs")
    with pytest.raises(UsageError, match=r"model holds 2, which is none of ours; move it"):
        write_model_folder(tmp_path / "models", engine, plan)
    assert other.read_bytes() == b"theirs"


def test_the_doctor_looks_into_the_folder(plan, engine, tmp_path):
    folder = write_model_folder(tmp_path / "models", engine, plan.model_copy(update={"backend": "tensorrt-rtx"}))
    lines, trouble = doctor.examine(folder)
    assert trouble is None and any("opset       onnx" in line for line in lines)
    (folder / "1" / "model.onnx").write_bytes(b"damaged")
    assert "is no readable ONNX file" in str(doctor.examine(folder)[1])
    folder = write_model_folder(tmp_path / "plans", engine, plan.model_copy(update={"build": {"bytes": 9999}}))
    assert "it is truncated or of another build" in str(doctor.examine(folder)[1])
