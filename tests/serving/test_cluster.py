"""Workers are made to fit the cluster, or refused; Ray itself would wait for ever."""

from __future__ import annotations

import pytest

from pipeline.errors import UsageError, WorkError
from serving.cluster import Node, Workers, connect, fit_workers

TWO = [Node(cpus=2, gpus=0)]
GPUS = [Node(cpus=4, gpus=1), Node(cpus=4, gpus=1)]
MIXED = [Node(cpus=32, gpus=0), Node(cpus=16, gpus=4)]


def fit(nodes: list[Node], free: list[Node] | None = None, **asked) -> Workers:
    wanted = {"workers": None, "cpus": None, "gpus": None, "shards": 1000, "reserved": 0} | asked
    return fit_workers(nodes, nodes if free is None else free, **wanted)


@pytest.mark.parametrize(
    ("nodes", "free", "asked", "expected"),
    [
        (TWO, TWO, {}, Workers(count=1, cpus=2, gpus=0)),
        (TWO, TWO, {"workers": 2}, Workers(count=2, cpus=1, gpus=0)),
        (TWO, TWO, {"cpus": 1, "shards": 1}, Workers(count=1, cpus=1, gpus=0)),
        (TWO, TWO, {"reserved": 1}, Workers(count=1, cpus=1, gpus=0)),
        (TWO, [Node(cpus=1, gpus=0)], {}, Workers(count=1, cpus=1, gpus=0)),  # a service holds the other CPU
        (TWO, [Node(cpus=0, gpus=0)], {}, Workers(count=1, cpus=2, gpus=0)),  # all are busy: wait for them
        (MIXED, MIXED, {}, Workers(count=4, cpus=4, gpus=1)),
        (MIXED, MIXED, {"gpus": 0}, Workers(count=12, cpus=4, gpus=0)),
        (MIXED, MIXED, {"gpus": 0.5, "cpus": 2}, Workers(count=8, cpus=2, gpus=0.5)),
        ([Node(cpus=3, gpus=0)] * 2, [Node(cpus=3, gpus=0)] * 2, {"workers": 3}, Workers(count=3, cpus=1, gpus=0)),
        # Those who decode go where there is no GPU, and to the others only when that is full.
        (MIXED, MIXED, {"cpus": 4, "reserved": 32}, Workers(count=4, cpus=4, gpus=1)),
        (
            MIXED,
            MIXED,
            {"cpus": 4, "reserved": 34},
            Workers(count=3, cpus=4, gpus=1),
        ),
    ],
)
def test_what_fits(nodes: list[Node], free: list[Node], asked: dict, expected: Workers) -> None:
    assert fit(nodes, free, **asked) == expected


@pytest.mark.parametrize(
    ("nodes", "asked", "said"),
    [
        (TWO, {"workers": 3, "cpus": 1}, "3 workers of 1 CPUs do not fit: the cluster has 2 CPUs, room for 2"),
        (TWO, {"cpus": 3}, "no worker of 3 CPUs fits"),
        (TWO, {"gpus": 1}, "no worker of 2 CPUs and 1 GPUs fits: the cluster has 2 CPUs and 0 GPUs"),
        (TWO, {"cpus": 2, "reserved": 1}, "1 of them kept for decoding"),
        (MIXED, {"workers": 5}, "on 2 nodes"),
        (GPUS, {"cpus": 4, "gpus": 1, "reserved": 2}, "2 of them kept for decoding"),  # one on each: no room for either
    ],
)
def test_what_does_not(nodes: list[Node], asked: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        fit(nodes, **asked)


@pytest.mark.parametrize(
    ("address", "remedy"), [("", "when the machine is less busy"), ("10.0.0.1:1", "unset RAY_ADDRESS")]
)
def test_a_cluster_that_does_not_start_is_said_on_one_line(
    address: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def fails(**_options: object) -> None:
        raise Exception("The current node timed out\nduring startup.")

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fails)
    with pytest.raises(WorkError, match=rf"no Ray: .*timed out during startup.*{remedy}"):
        connect()
