"""Workers ask for no more CPUs than let all of them find a place."""

from __future__ import annotations

import pytest

from pipeline.errors import UsageError
from pipeline.placement import Machine, cpus_per_worker, place, room


def cluster(*machines: tuple[int, int]) -> list[Machine]:
    return [Machine(cpus=cpus, gpus=gpus) for cpus, gpus in machines]


@pytest.mark.parametrize(
    ("machines", "workers", "gpu", "cpus"),
    [
        (cluster((2, 0)), 1, False, 2),
        (cluster((2, 0)), 2, False, 1),
        (cluster((0, 0), (8, 0), (8, 0)), 1, False, 8),  # 16 CPUs are on no machine
        (cluster((0, 0), (8, 0), (8, 0)), 3, False, 4),
        (cluster((16, 8), (4, 0)), 8, True, 2),
        (cluster((16, 2), (16, 2)), 4, True, 8),
        (cluster((16, 1), (64, 0)), 1, True, 16),
        (cluster((2, 0)), 4, False, 1),
        (cluster((8, 1)), 4, True, 8),  # of an elastic run, before its other machines are there
        (cluster((8, 0)), 1, True, 1),  # no GPU: refused elsewhere
    ],
)
def test_as_many_as_fit(machines: list[Machine], workers: int, gpu: bool, cpus: int) -> None:
    assert cpus_per_worker(machines, workers, gpu=gpu) == cpus


def test_asked_for_cpus_are_taken_or_refused() -> None:
    two = cluster((8, 0), (8, 0))
    assert place(two, (2, 8), gpu=False) == 2, "all eight fit on the machines of the start, so no more would come"
    assert place(two, (2, 8), gpu=False, cpus=8) == 8
    with pytest.raises(UsageError, match="the cluster has 16 CPUs, each worker needs 8 on one machine"):
        place(two, (3, 8), gpu=False, cpus=8)
    with pytest.raises(UsageError, match="the cluster has 16 CPUs and 0 GPUs, each worker needs one"):
        place(two, (1, 8), gpu=True)
    assert place(None, (2, 8), gpu=True, cpus=8) == 8, "machines that an autoscaler has not started yet"


def test_room() -> None:
    assert room(cluster((8, 0), (4, 2)), 2, gpu=False) == 6
    assert room(cluster((8, 0), (4, 2)), 2, gpu=True) == 2
    assert room([], 1, gpu=False) == 0
