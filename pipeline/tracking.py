"""A run's figures on an MLflow server, where ``$MLFLOW_TRACKING_URI`` names one."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.data import store

ID_FILE = "mlflow_run"
"""In the run's folder: the id by which the server knows the run, so that one that goes on is the same one there."""
SPACING = 1.0
"""Seconds between two steps whose figures are sent; quicker steps are left out."""
LARGEST = 1000
"""Figures of one request, which is as many as MLflow takes."""
PAUSE = 600.0
"""Seconds for which a server that did not answer is left alone: the other workers wait while it is asked."""
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""MLflow's own variables, where the user has not set them: it would try for 20 minutes."""
SECRET = re.compile(r"//[^/@\s]+@")
"""User and password in a URI."""
PARAMETERS = ("preset", "name", "weights", "steps", "budget", "batch_size", "seed", "input_size", "settings")
"""Fields of the plan that the server is told."""


@dataclass(frozen=True)
class Server:
    """Where figures go; plain values, for workers have an environment of their own."""

    uri: str
    experiment: str


def chosen_server() -> Server | None:
    """The server of the environment (``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``); none where there is none."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return None
    if importlib.util.find_spec("mlflow") is None:
        print(
            "MLFLOW_TRACKING_URI is set and mlflow is not installed: nothing is logged there; "
            "pip install 'onepass-saliency[mlflow]'",
            file=sys.stderr,
        )
        return None
    return Server(uri, os.environ.get("MLFLOW_EXPERIMENT_NAME") or "onepass-saliency")


class Tracking:
    """Sends figures when it is told to; a server that does not answer costs its figures and not the run."""

    def __init__(self, server: Server, run: str, plan: Mapping[str, Any]) -> None:
        """``plan``: fields of the `TrainingPlan`."""
        self._waiting: list[tuple[int, str, float, int]] = []
        self._last = self._asked = -math.inf
        self._client: Any = None
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow.tracking import MlflowClient

            client = MlflowClient(tracking_uri=server.uri)
            self._id = self._known(client, run) or self._new(client, server, run, plan)
            client.update_run(self._id, status="RUNNING")
            self._client = client
        except Exception as error:  # the client raises whatever its network library raises
            self._say(error)

    def _known(self, client: Any, run: str) -> str | None:
        from mlflow.exceptions import MlflowException

        noted = store.read_optional(store.join(store.place_of(run), ID_FILE))
        try:
            return client.get_run(noted.decode()).info.run_id if noted else None
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # deleted, or known to another server
                return None
            raise

    def _new(self, client: Any, server: Server, run: str, plan: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        experiment = client.get_experiment_by_name(server.experiment)
        number = experiment.experiment_id if experiment else client.create_experiment(server.experiment)
        made = client.create_run(number, run_name=store.name_of(store.place_of(run))).info.run_id
        told = [Param(name, str(plan[name])[:500]) for name in PARAMETERS if plan.get(name) is not None]
        client.log_batch(made, params=told)
        store.write_bytes(store.join(store.place_of(run), ID_FILE), made.encode())
        return made

    def add(self, step: int, numbers: Mapping[str, object]) -> None:
        """Figures of ``step``; whatever is no number is left out."""
        if self._client is None or time.monotonic() - self._last < SPACING:
            return
        self._last, now = time.monotonic(), int(time.time() * 1000)
        for name, value in numbers.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._waiting.append((now, name, float(value), step))

    def flush(self) -> None:
        """Send what there is; to a server that has not answered lately, nothing, and what there is is dropped."""
        if time.monotonic() - self._asked < PAUSE:
            self._waiting.clear()
        while self._client is not None and self._waiting:
            from mlflow.entities import Metric

            part, self._waiting = self._waiting[:LARGEST], self._waiting[LARGEST:]
            try:
                metrics = [Metric(name, value, when, step) for when, name, value, step in part]
                self._client.log_batch(self._id, metrics=metrics)
            except Exception as error:
                self._say(error)

    def close(self) -> None:
        """Send everything, and say that the run has ended."""
        self.flush()
        if self._client is None or time.monotonic() - self._asked < PAUSE:
            return
        try:
            self._client.set_terminated(self._id)
        except Exception as error:
            self._say(error)

    def _say(self, error: Exception) -> None:
        self._asked = time.monotonic()
        self._waiting.clear()
        reason = SECRET.sub("//", " ".join(str(error).split()))
        print(f"figures do not reach MLflow: {reason[:200]}", file=sys.stderr)
