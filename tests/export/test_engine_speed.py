"""The benchmark of engines as a script on a CPU, and how it ends when the gate fails an engine."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch

from tests.benchmarks import engine_speed


@pytest.fixture
def small(monkeypatch):
    """``small(out)``: the flags of a run of seconds; of the contestants torch and ONNX Runtime in float32."""
    every = engine_speed.contestants

    def few(*arguments):
        made = every(*arguments)
        return {name: make for name, make in made.items() if not name.startswith(("torch.compile", "tensorrt"))}

    monkeypatch.setattr(engine_speed, "PRECISIONS", {"fp32": "fp32"})
    monkeypatch.setattr(engine_speed, "contestants", few)

    def flags(out):
        words = [
            "--init",
            "timm:test_resnet",
            "--image-size",
            "64",
            "--batch",
            "1,2",
            "--seconds",
            "0",
            "--device",
            "cpu",
        ]
        monkeypatch.setattr("sys.argv", ["engine_speed", *words, "--out", str(out)])

    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield flags
    # The script sets them for its process, which is here that of all tests.
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed


def test_the_script_on_a_cpu(small, tmp_path):
    small(tmp_path / "result.json")
    engine_speed.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["cannot_run"] == {} and result["gate"] == {"fp32.onnx": "passed", "torch bf16": "passed"}
    rates = result["images_per_second"]
    assert {"torch bf16, with copies", "torch fp32, through the host", "onnxruntime fp32, through the host"} < set(
        rates
    )
    assert all(set(rows) == {"1", "2"} and min(row["rate"] for row in rows.values()) > 0 for rows in rates.values())
    assert set(result["mask_costs"]) == {"torch fp32", "torch bf16", "onnxruntime fp32"}


def test_a_failed_gate_is_a_failed_script(small, tmp_path, monkeypatch):
    small(tmp_path / "result.json")
    lost = {"tensorrt fp8": "UsageError: needs an NVIDIA GPU", "tensorrt int8": "ParityFailure: mask_iou 0.1"}
    gate = {"fp16.plan": "failed: mask_iou 0.1", "bf16.onnx": "not run: UsageError: a GPU", "fp32.onnx": "passed"}
    monkeypatch.setattr(engine_speed, "measure", lambda *_: {"cannot_run": lost, "gate": gate})
    with pytest.raises(SystemExit, match=r"the gate failed tensorrt int8, fp16\.plan"):
        engine_speed.main()
    assert (tmp_path / "result.json").is_file(), "what was measured is kept"


def test_copies_are_timed_without_making_room_for_them(small, monkeypatch):
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: made.append(how["pin_memory"]) or empty(*shape, **how))
    images = torch.arange(12, dtype=torch.uint8).reshape(2, 6)
    timed = engine_speed.with_copies(lambda pixels: (pixels * 2, pixels + 1), Namespace(device="cpu"))
    for _ in range(3):
        double, next_one = timed(images)
    assert torch.equal(double, images * 2) and torch.equal(next_one, images + 1)
    assert made == [False] * 3, "one for the images, two for the answers, all in the first call"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_every_precision_has_its_rows(precision, bundle, tmp_path):
    rows = engine_speed.contestants(Namespace(device="cpu"), bundle, tmp_path, 8)
    for runtime in ("onnxruntime", "tensorrt"):
        assert {f"{runtime} {precision}{what}" for what in ("", engine_speed.ALONE, engine_speed.HOST)} < set(rows)
