"""Figures of a run on an MLflow server; here the library's own store of files."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipeline import tracking
from pipeline.tracking import Server, Tracking, chosen_server

PLAN = {"preset": "fix", "seed": 3, "steps": 20, "budget": None, "paths": ["a"]}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    found = chosen_server()
    assert found is not None
    return found


def test_a_run_that_goes_on_is_the_same_one(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SPACING", 0.0)
    monkeypatch.setattr(tracking, "LARGEST", 3)
    run = str(tmp_path / "run")
    first = Tracking(server, run, PLAN)
    for step in (1, 2):
        first.add(step, {"train/loss": 1.0 / step, "train/phase": "joint", "train/top1": 0.5})
    first.flush()
    again = Tracking(server, run, PLAN)
    again.add(3, {"train/loss": 0.25})
    again.close()
    client = MlflowClient(tracking_uri=server.uri)
    experiment = client.get_experiment_by_name("onepass-saliency")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "run" and found.info.status == "FINISHED"
    assert found.data.params == {"preset": "fix", "seed": "3", "steps": "20"}
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5), (3, 0.25)]


def test_quick_steps_are_thinned(server: Server, tmp_path: Path) -> None:
    here = Tracking(server, str(tmp_path / "run"), PLAN)
    for step in range(100):
        here.add(step, {"train/loss": 1.0})
    assert len(here._waiting) == 1


def test_a_server_that_is_away_costs_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = Tracking(Server("http://127.0.0.1:9", "x"), str(tmp_path / "run"), PLAN)
    away.add(1, {"train/loss": 1.0})
    away.flush()
    away.close()
    assert capsys.readouterr().err.startswith("figures do not reach MLflow: ")


def test_a_server_that_stops_answering_is_left_alone(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sends keeps the other workers waiting."""
    monkeypatch.setattr(tracking, "SPACING", 0.0)
    here = Tracking(server, str(tmp_path / "run"), PLAN)
    asked: list[int] = []

    def away(*_: object, **__: object) -> None:
        asked.append(1)
        raise OSError("API request to http://me:secret@host/api failed")

    monkeypatch.setattr(here._client, "log_batch", away)
    for step in range(3000):
        here.add(step, {"train/loss": 1.0})
    here.flush()
    here.add(3000, {"train/loss": 1.0})
    here.flush()
    here.close()
    said = capsys.readouterr().err
    assert len(asked) == 1 and "secret" not in said and "http://host/api" in said


def test_a_run_that_the_server_has_forgotten_is_made_anew(server: Server, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / tracking.ID_FILE).write_text("0123456789abcdef0123456789abcdef")
    Tracking(server, str(run), PLAN).close()
    assert (run / tracking.ID_FILE).read_text() != "0123456789abcdef0123456789abcdef"


def test_without_a_server_or_the_library_nothing_is_sent(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert chosen_server() is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    assert chosen_server() is None and "mlflow is not installed" in capsys.readouterr().err
