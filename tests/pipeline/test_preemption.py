"""A machine that its cloud takes back: Ray drains the node, and the training writes a checkpoint while it still can."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.data.planted import write_planted
from tests.pipeline.test_train import ENVIRONMENT, SMALL

SECONDS = 240


def steps_of(out: Path) -> list[int]:
    """Steps of the checkpoints that are whole."""
    logs = sorted(out.glob("checkpoints/checkpoint_*/log.csv"))
    return [len(log.read_text().splitlines()) - 1 for log in logs]


def listed_step(out: Path) -> int:
    """The step of the checkpoint that Ray lists as the latest; 0 while there is no list, or it is being written."""
    try:
        listed = json.loads((out / "checkpoints" / "checkpoint_manager_snapshot.json").read_text())
        return listed["latest_checkpoint_result"]["metrics"]["step"]
    except (OSError, ValueError, TypeError):
        return 0


@pytest.mark.timeout(600)
def test_a_drained_node_gets_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    data, out = tmp_path / "data", tmp_path / "run"
    write_planted(data, seed=0, size=48, per_class_train=4, per_class_val=1)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    node = cluster.add_node(num_cpus=1)
    command = [
        sys.executable,
        "-m",
        "pipeline.train",
        "--preset",
        "fix",
        "--data",
        str(data),
        "--out",
        str(out),
        *SMALL,
    ]
    command += ["--steps", "1000000", "--checkpoint-every", "1d", "--cpus-per-worker", "1"]
    environment = ENVIRONMENT | {"RAY_ADDRESS": cluster.address, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    run = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + SECONDS
        while not steps_of(out):  # the one of every new run
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(2)
        first = steps_of(out)
        assert len(first) == 1
        drain = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", cluster.address]
        drain += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        drain += ["--reason-message", "taken back", "--deadline-remaining-seconds", "300"]
        subprocess.run(drain, env=environment, check=True, capture_output=True, timeout=120)
        deadline = time.monotonic() + 60
        while listed_step(out) <= first[0]:
            assert run.poll() is None and time.monotonic() < deadline, "no checkpoint came of the notice"
            time.sleep(0.2)
        assert steps_of(out)[-1] == listed_step(out), "what a new start begins with"
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        cluster.shutdown()
