"""The Ray cluster that a job runs on: joining or starting it, and whether the workers fit."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import UsageError, WorkError

MOST_CPUS_PER_WORKER = 4
"""Beyond so many threads, more workers are faster than more threads in each."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The pool that scores."""

    count: int
    cpus: float
    """CPUs of each, which is also how many threads it uses."""
    gpus: float


def connect() -> None:
    """Join the cluster that ``RAY_ADDRESS`` names; without one, start a private cluster on this machine.

    A private cluster lets only those in who know a token that is made up here.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's core would otherwise write about its own affairs between the lines of our progress.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Ray's workers would otherwise give way to everything else on the machine (niceness 15), and beside a busy process
    # take minutes to begin.
    os.environ.setdefault("RAY_worker_niceness", "0")
    address = os.environ.get("RAY_ADDRESS")
    if not address and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        with _hushed():
            if address:
                ray.init(address=address, **options)
            else:
                ray.init(address="local", include_dashboard=False, **options)
    except Exception as error:  # a node that is too slow to start raises one without a name
        reason = " ".join(str(error).split())[:200]
        where = f"the cluster at RAY_ADDRESS={address}" if address else "a cluster on this machine"
        remedy = "correct or unset RAY_ADDRESS" if address else "run the command again when the machine is less busy"
        raise WorkError(f"no Ray: cannot use {where} ({reason}); {remedy}") from error


@contextmanager
def _hushed() -> Iterator[None]:
    """Standard error closed for Ray's core, which greets on the descriptor itself while it starts."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a descriptor is wanted
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a node of the cluster has, or has free."""

    cpus: int
    gpus: float


def plan_workers(
    *,
    workers: int | None,
    cpus: int | None,
    gpus: float | None,
    shards: int,
    reserved: int = 0,
    autoscale: bool = False,
) -> Workers:
    """How many workers of which size: see `fit_workers`; with ``autoscale`` what is asked for, whether it is there or not."""
    if autoscale:
        if workers is None or cpus is None or gpus is None:
            raise UsageError(
                "--autoscale asks for nodes that are not there, so it needs --workers, --cpus-per-worker and --num-gpus"
            )
        return Workers(count=min(workers, shards), cpus=cpus, gpus=gpus)
    return fit_workers(
        nodes(free=False), nodes(free=True), workers=workers, cpus=cpus, gpus=gpus, shards=shards, reserved=reserved
    )


def nodes(*, free: bool) -> list[Node]:
    """The living nodes of the cluster, with all that they have or with what nobody holds at the moment."""
    import ray
    from ray._private.state import available_resources_per_node

    held = available_resources_per_node() if free else {}
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            resources = held.get(node["NodeID"], {}) if free else node["Resources"]
            found.append(Node(cpus=int(resources.get("CPU", 0)), gpus=resources.get("GPU", 0.0)))
    return found


def fit_workers(
    all_of: list[Node],
    free_of: list[Node],
    *,
    workers: int | None,
    cpus: int | None,
    gpus: float | None,
    shards: int,
    reserved: int,
) -> Workers:
    """How many workers of which size: never more than there are shards, nor more than the cluster can ever hold.

    What is not asked for is chosen by what is free now, since others (a service, say) may hold the rest for ever.
    ``reserved``: CPUs that only decode, which Ray places first (`serving.flow`): beside workers only where every node
    could hold one.  It would wait without a word for workers that do not fit any more.

    Raises:
        UsageError: they do not fit.
    """
    each_gpus = (1.0 if any(node.gpus for node in all_of) else 0.0) if gpus is None else gpus
    decoding = _place_decoders(all_of, reserved, beside_gpus=not each_gpus)
    all_left, free_left = _without(all_of, decoding), _without(free_of, decoding)
    usable = [node for node in free_left if node.gpus >= each_gpus]
    usable = usable if any(node.cpus for node in usable) else all_left
    if cpus is not None:
        each_cpus = cpus
    else:
        share = sum(node.cpus for node in usable) // (workers or 1)
        each_cpus = max(1, min(MOST_CPUS_PER_WORKER, max((node.cpus for node in usable), default=0), share))

    def room(found: list[Node], size: int) -> int:
        by_cpu = [node.cpus // size for node in found]
        if each_gpus:
            by_cpu = [min(count, int(node.gpus / each_gpus)) for count, node in zip(by_cpu, found, strict=True)]
        return sum(by_cpu)

    if cpus is None:
        # A worker lives on one node: its share of all CPUs may be more than nodes have to give.
        sizes = range(each_cpus, 0, -1)
        each_cpus = next((size for size in sizes if room(all_left, size) >= (workers or 1)), each_cpus)
    most = room(all_left, each_cpus)
    all_cpus, all_gpus = sum(node.cpus for node in all_of), sum(node.gpus for node in all_of)
    wanted = f"{each_cpus} CPUs" + (f" and {each_gpus:g} GPUs" if each_gpus else "")
    have = f"the cluster has {all_cpus} CPUs" + (f" and {all_gpus:g} GPUs" if each_gpus else "")
    have += f" on {len(all_of)} nodes" if len(all_of) > 1 else ""
    have += f", {reserved} of them kept for decoding" if reserved else ""
    if most < 1:
        raise UsageError(f"no worker of {wanted} fits: {have}; lower --cpus-per-worker, --num-gpus or --decode-cpus")
    if workers is not None and workers > most:
        raise UsageError(f"{workers} workers of {wanted} do not fit: {have}, room for {most}; lower --workers")
    return Workers(
        count=max(1, min(workers or room(free_left, each_cpus) or most, shards)), cpus=each_cpus, gpus=each_gpus
    )


def _place_decoders(nodes: list[Node], count: int, *, beside_gpus: bool) -> list[int]:
    """The numbers of the nodes that decode, one for each CPU, evenly; nodes with GPUs come last unless ``beside_gpus``."""
    left = [node.cpus for node in nodes]
    chosen: list[int] = []
    for _ in range(min(count, sum(left))):
        best = max(range(len(nodes)), key=lambda k: (left[k] > 0, beside_gpus or not nodes[k].gpus, left[k]))
        left[best] -= 1
        chosen.append(best)
    return chosen


def _without(nodes: list[Node], decoding: list[int]) -> list[Node]:
    return [replace(node, cpus=max(0, node.cpus - decoding.count(k))) for k, node in enumerate(nodes)]
