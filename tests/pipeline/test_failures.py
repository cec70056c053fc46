"""What tells a fault that stays from machines that are lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed import DistBackendError

from pipeline import failures
from pipeline.data.store import StoreError
from pipeline.errors import WorkError


def test_the_same_error_at_the_same_step_is_lasting(tmp_path: Path) -> None:
    run = str(tmp_path)
    assert failures.lasting(run, 0) is None
    for _ in range(failures.MOST):
        assert failures.lasting(run, 40) is None
        failures.record(run, 1, 40, ValueError("a\nb"))
    found = failures.lasting(run, 40)
    assert found == failures.Failure(40, "ValueError: a b", failures.MOST)
    assert failures.lasting(run, 41) is None, "a run that came further has got over it"


@pytest.mark.parametrize(("step", "error"), [(41, "lost"), (40, "another")])
def test_progress_or_another_error_counts_anew(tmp_path: Path, step: int, error: str) -> None:
    run = str(tmp_path)
    for _ in range(failures.MOST - 1):
        failures.record(run, 0, 40, OSError("lost"))
    failures.record(run, 0, step, OSError(error))
    assert failures.lasting(run, 40) is None and failures.lasting(run, 41) is None


def test_what_differs_by_chance_does_not_count(tmp_path: Path) -> None:
    for number in range(failures.MOST):
        failures.record(str(tmp_path), 0, 0, OSError(f"no space for /tmp/tmpab{number}cd/state.pt, {9 + number} bytes"))
    found = failures.lasting(str(tmp_path), 0)
    assert found is not None and "tmpab2cd" in found.error, "the last message, as it was"


def test_a_class_with_the_name_of_a_library_is_no_excuse(tmp_path: Path) -> None:
    for _ in range(failures.MOST):
        failures.record(str(tmp_path), 0, 0, WorkError("train/igloo/1.jpg: damaged; see NCCL error or /gloo/"))
    assert failures.lasting(str(tmp_path), 0) is not None


def test_a_note_that_cannot_be_written_hides_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("a file where the run's folder should be")
    failures.record(str(tmp_path / "run"), 2, 0, ValueError("the real one"))
    assert "failure of worker 2 is not noted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[.../gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:4242"),
        DistBackendError("remote process exited"),
        ConnectionResetError(104, "Connection reset by peer"),
        StoreError("s3://bucket/data: not reached"),
        OSError("When initiating multiple part upload for key 'x': AWS Error NETWORK_CONNECTION during PutObject"),
    ],
)
def test_losing_another_worker_is_no_fault(tmp_path: Path, error: Exception) -> None:
    for _ in range(failures.MOST):
        failures.record(str(tmp_path), 1, 0, error)
    assert failures.lasting(str(tmp_path), 0) is None


def test_running_the_command_again_forgets(tmp_path: Path) -> None:
    for _ in range(failures.MOST):
        failures.record(str(tmp_path), 0, 0, OSError("lost"))
    failures.forget(str(tmp_path))
    assert failures.lasting(str(tmp_path), 0) is None


def test_a_store_that_refuses_is_a_fault_that_stays(tmp_path: Path) -> None:
    for _ in range(failures.MOST):
        failures.record(str(tmp_path), 0, 0, OSError("When writing key 'x': AWS Error ACCESS_DENIED during PutObject"))
    assert failures.lasting(str(tmp_path), 0) is not None
