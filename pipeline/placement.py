"""How many CPUs a training worker asks for: as many as let all workers find a place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a node of the cluster has."""

    cpus: int
    gpus: int


def machines() -> list[Machine]:
    """The living nodes of the cluster that this process has joined."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Machine(cpus=int(has.get("CPU", 0)), gpus=int(has.get("GPU", 0))) for has in alive]


def room(found: Sequence[Machine], cpus: int, *, gpu: bool) -> int:
    """Workers of ``cpus`` CPUs each, and a GPU each where ``gpu``, that fit on the machines at a time."""
    return sum(min(machine.cpus // cpus, machine.gpus) if gpu else machine.cpus // cpus for machine in found)


def cpus_per_worker(found: Sequence[Machine], workers: int, *, gpu: bool) -> int:
    """The most CPUs of a worker with which ``workers`` fit, or as many of them as there is room for at all.

    A worker lives on one machine, so the CPUs of the cluster by the number of workers may be more than any machine has, and
    Ray would wait for such a machine for ever.
    """
    largest = max((machine.cpus for machine in found), default=1)
    workers = max(
        1, min(workers, room(found, 1, gpu=gpu))
    )  # an elastic run may begin before all its machines are there
    return next((cpus for cpus in range(largest, 0, -1) if room(found, cpus, gpu=gpu) >= workers), 1)
