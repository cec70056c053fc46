"""A cluster of several nodes on this machine, whose nodes and workers can be killed."""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def run_measured(
    flags: argparse.Namespace, measure: Callable[[argparse.Namespace, Path], dict[str, Any]]
) -> dict[str, Any]:
    """``measure(flags, folder)`` in a folder of its own, with a token for its cluster; shown, and written to ``flags.out``."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0"}
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "error"
    with TemporaryDirectory() as folder:
        result = measure(flags, Path(folder))
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if flags.out:
        flags.out.write_text(text)
    return result


class Nodes:
    """A cluster of a head without CPUs and two nodes with one each."""

    def __init__(self, worker: str) -> None:
        """``worker``: how the names of the processes that work begin, after ``ray::``."""
        self.worker = worker

    def __enter__(self) -> Nodes:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self._nodes = [self._added() for _ in range(2)]
        self.address = self._cluster.address
        return self

    def kill(self) -> None:
        """Kill a node with everything on it, and add a fresh one."""
        self.shrink()
        self.grow()

    def shrink(self) -> None:
        """Kill a node with everything on it."""
        self._cluster.remove_node(self._nodes.pop(0), allow_graceful=False)

    def grow(self) -> None:
        """Add a node."""
        self._nodes.append(self._added())

    def kill_worker(self, chance: random.Random) -> bool:
        """Kill one of the processes that work; False when there is none at the moment."""
        raylets = [str(node.all_processes["raylet"][0].process.pid) for node in self._nodes]
        command = ["pgrep", "-P", ",".join(raylets), "-f", f"^ray::{self.worker}"]
        found = subprocess.run(command, capture_output=True, text=True).stdout.split()
        if found:
            os.kill(int(chance.choice(found)), signal.SIGKILL)
        return bool(found)

    def _added(self) -> Any:
        for _ in range(5):  # on a busy machine a node may be too slow for Ray's patience
            try:
                return self._cluster.add_node(num_cpus=1)
            except Exception as error:
                print(f"a node did not start ({error}); once more", file=sys.stderr)
        raise RuntimeError("no node would start")

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()
