"""How many images an engine takes per second."""

from __future__ import annotations

import time

import numpy as np

from export.engine import Engine


def images_per_second(engine: Engine, images: np.ndarray, *, batch: int, seconds: float = 2.0) -> float:
    """Median over runs of about ``seconds`` in all, after one to warm up; images (n, S, S, 3) are repeated to fill."""
    part = images[np.arange(batch) % len(images)]
    engine.infer(part)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        engine.infer(part)
        times.append(time.perf_counter() - started)
    return batch / float(np.median(times))
