"""How many CPUs a training worker asks for: as many as let all workers find a place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import UsageError


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


def place(found: Sequence[Machine] | None, workers: tuple[int, int], *, gpu: bool, cpus: int | None = None) -> int:
    """The CPUs of each of ``workers`` (fewest, most): ``cpus`` where that is given, else what `cpus_per_worker` says.

    ``found``: none where everything is given and the cluster may still grow: an autoscaler starts machines for workers.

    Raises:
        UsageError: the fewest workers do not fit.
    """
    if found is None:
        assert cpus is not None, "nothing says how many CPUs a worker gets"
        return cpus
    least, most = workers
    each = cpus_per_worker(found, most, gpu=gpu) if cpus is None else cpus
    if room(found, cpus or 1, gpu=gpu) < least:
        has = f"{sum(machine.cpus for machine in found)} CPUs"
        has += f" and {sum(machine.gpus for machine in found)} GPUs" if gpu else ""
        needs = "one" if cpus is None else f"{cpus} on one machine"
        raise UsageError(f"--workers {least}: the cluster has {has}, each worker needs {needs}; ask for fewer workers")
    return each


def cpus_per_worker(found: Sequence[Machine], workers: int, *, gpu: bool) -> int:
    """The most CPUs of a worker with which ``workers`` fit, or as many of them as there is room for at all.

    A worker lives on one machine, so the CPUs of the cluster by the number of workers may be more than any machine has, and
    Ray would wait for such a machine for ever.
    """
    largest = max((machine.cpus for machine in found), default=1)
    # An elastic run may begin before all its machines are there.
    workers = max(1, min(workers, room(found, 1, gpu=gpu)))
    return next((cpus for cpus in range(largest, 0, -1) if room(found, cpus, gpu=gpu) >= workers), 1)
