"""How many images an engine takes per second."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from export.engine import Engine
from export.gpu import gpus

MOST_RUNS = 50
"""More do not make a median surer."""


def images_per_second(engine: Engine, images: np.ndarray, *, batch: int, seconds: float = 2.0) -> float:
    """Median over runs of about ``seconds`` in all, at most `MOST_RUNS`, after one to warm up.

    ``images`` (n, S, S, 3) uint8 are repeated to fill the batch.
    """
    part = images[np.arange(batch) % len(images)]
    engine.infer(part)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 3 or (len(times) < MOST_RUNS and time.perf_counter() < until):
        started = time.perf_counter()
        engine.infer(part)
        times.append(time.perf_counter() - started)
    return batch / float(np.median(times))


def measured(engine: Engine, images: np.ndarray, *, opt: int) -> dict[str, Any]:
    """What a manifest keeps: images per second at batch 1 and at ``opt`` (at most 8 on a CPU), and where.

    ``engine``: what the gate ran, which without a GPU is the graph and not the plan.
    """
    on_cpu = engine.info.provider == "cpu"
    rates = {
        str(batch): round(images_per_second(engine, images, batch=batch, seconds=1.0), 1)
        for batch in sorted({1, min(opt, 8) if on_cpu else opt})
    }
    return {"images_per_second": rates, "on": f"CPU, {engine.info.kind}" if on_cpu else gpus()[0].name}
