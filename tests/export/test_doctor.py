"""`export.doctor` on engines: a manifest is worth what its engine is worth, and only what runs here is usable here."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from export import doctor
from export.manifest import Manifest, Profile, manifest_path, versions_of, write_sidecar
from pipeline.errors import WorkError


@pytest.fixture
def plan(exported, tmp_path) -> Path:
    """A plan that is the one of its manifest, as far as can be seen without a GPU."""
    path = tmp_path / "model.plan"
    path.write_bytes(b"plan")
    manifest: Manifest = exported.manifest.model_copy(
        update={
            "kind": "tensorrt", "backend": "tensorrt-rtx", "profiles": [Profile(min=1, opt=2, max=4)],
            "engine_sha256": hashlib.sha256(b"plan").hexdigest(), "build": {"bytes": 4},
            "versions": versions_of("tensorrt-rtx"),
        }
    )  # fmt: skip
    write_sidecar(path, manifest)
    return path


@pytest.mark.usefixtures("no_card")
def test_a_manifest_whose_engine_cannot_run_here_is_not_usable(plan, complaint):
    lines, trouble = doctor.examine(manifest_path(plan))
    assert lines[0].endswith("an engine manifest") and any("batches     1 to 4, best at 2" in line for line in lines)
    assert trouble is not None and "needs an NVIDIA GPU" in trouble
    assert "needs an NVIDIA GPU" in complaint(doctor, manifest_path(plan), status=1)


def test_a_manifest_whose_engine_is_truncated_or_another_one(plan, complaint):
    plan.write_bytes(b"pla")
    assert "it is truncated or of another build" in complaint(doctor, manifest_path(plan), status=1)
    plan.write_bytes(b"nalp")
    assert "is not the plan that its manifest describes" in complaint(doctor, manifest_path(plan), status=1)
    plan.unlink()
    assert "model.plan is not beside it; copy it, or rebuild it" in complaint(doctor, manifest_path(plan), status=1)


def test_a_gpu_that_fails_is_a_verdict_and_no_end(plan, monkeypatch):
    def failing(path: Path) -> None:
        raise WorkError("CUDA: cudaMalloc failed: out of memory")

    monkeypatch.setattr("export.plan_engine.check_fit", lambda *_: None)
    monkeypatch.setattr("export.plan_engine.PlanEngine", failing)
    lines, trouble = doctor.examine(plan)
    assert lines and trouble == "CUDA: cudaMalloc failed: out of memory"
