"""A cluster of several nodes on this machine, whose nodes and workers can be killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from typing import Any


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
