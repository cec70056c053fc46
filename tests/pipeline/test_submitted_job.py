"""`python -m pipeline.train` as a job of a Ray cluster."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.data.planted import write_planted
from tests.pipeline.test_train import ENVIRONMENT, SMALL, committed


def free_port() -> int:
    """A port that nobody listens on, and that is none of those that Ray gives its workers."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if not 10000 <= port <= 19999:
            return port


@pytest.mark.timeout(1500)
def test_as_a_submitted_job(tmp_path: Path) -> None:
    """`ray job submit -- python -m pipeline.train ...`, stopped and submitted again, on a cluster of its own."""
    data = tmp_path / "data"
    write_planted(data, seed=0, size=48, per_class_train=4, per_class_val=1)
    binaries = Path(sys.executable).parent
    token = tmp_path / "token"
    token.write_text("t" * 32)
    environment = ENVIRONMENT | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "RAY_TMPDIR": str(tmp_path)[:40],
    }
    environment.pop("RAY_ADDRESS", None)
    port, dashboard = free_port(), free_port()
    head = subprocess.Popen(
        [
            *(binaries / "ray", "start", "--head", "--block", "--num-cpus", "2", "--port", str(port)),
            *(
                "--dashboard-host",
                "127.0.0.1",
                "--dashboard-port",
                str(dashboard),
                "--temp-dir",
                f"/tmp/ray-{os.getpid()}",
            ),
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        where = ("--address", f"http://127.0.0.1:{dashboard}")
        out = tmp_path / "run"
        command = [
            *(sys.executable, "-m", "pipeline.train", "--preset", "fix", "--data", str(data)),
            *("--out", str(out), "--checkpoint-every", "0.5s", "--workers", "1:1", *SMALL),
        ]

        def job(*words: object) -> subprocess.CompletedProcess[str]:
            words = (binaries / "ray", "job", *words)
            return subprocess.run(
                [str(word) for word in words], env=environment, capture_output=True, text=True, timeout=600, check=False
            )

        deadline = time.monotonic() + 240
        while True:  # the port opens before the job server behind it
            begun = job("submit", *where, "--no-wait", "--submission-id", "first", "--", *command, "--steps", "100000")
            if begun.returncode == 0:
                break
            assert time.monotonic() < deadline, begun.stdout[-2000:] + begun.stderr[-2000:]
            time.sleep(1)
        deadline = time.monotonic() + 300
        while not committed(out):
            assert time.monotonic() < deadline, job("logs", *where, "first").stdout[-2000:]
            time.sleep(0.2)
        stopped = job("stop", *where, "first")
        assert "was stopped" in stopped.stdout + stopped.stderr, stopped.stdout[-2000:] + stopped.stderr[-2000:]
        before = committed(out)
        saved = len(before) - 1
        result = job("submit", *where, "--", *command, "--steps", saved + 3)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        assert "model bundle:" in result.stdout
        waited = "falling below the minimum" in result.stdout + result.stderr
        assert not waited, "Ray kept the stopped run's places, and the next one waited for them"
        after = (out / "log.csv").read_text().splitlines()
        assert after[: saved + 1] == before, "no step was taken again"
        assert [int(row["step"]) for row in csv.DictReader(after)] == list(range(1, saved + 4))
        assert json.loads((tmp_path / "run/bundle/model.json").read_text())["preset"] == "fix"
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(f"/tmp/ray-{os.getpid()}", ignore_errors=True)
