"""95 % intervals by the bootstrap: the images are drawn again with replacement, a thousand times, from a fixed seed."""

from __future__ import annotations

import warnings

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
_CHUNK = 50


def bootstrap_means(values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Means (resamples, m) of the columns of ``values`` (n, m) over redrawn rows; nan marks a value that is missing.

    All columns see the same draws, so the difference of two columns may be given as a column of its own (paired).
    """
    count = len(values)
    present = np.isfinite(values)
    stacked = np.concatenate([np.where(present, values, 0.0), present], axis=1)  # (n, 2m)
    random = np.random.default_rng([seed, 0xB007])
    means = []
    for start in range(0, resamples, _CHUNK):  # bounded memory: n may be 50,000
        rows = min(_CHUNK, resamples - start)
        times = random.multinomial(count, np.full(count, 1 / count), size=rows).astype(np.float64)  # (rows, n)
        sums, counts = np.split(times @ stacked, 2, axis=1)
        means.append(np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0))
    return np.concatenate(means)


def intervals(columns: dict[str, np.ndarray], *, seed: int = 0) -> dict[str, list[float] | None]:
    """[low, high] of the mean of each per-image column (n,); None for a column without a value."""
    if not columns:
        return {}
    means = bootstrap_means(np.stack(list(columns.values()), axis=1), seed=seed)
    tail = 100 * (1 - LEVEL) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column of nothing but nan
        low, high = np.nanpercentile(means, [tail, 100 - tail], axis=0)
    return {name: [float(low[k]), float(high[k])] if np.isfinite(low[k]) else None for k, name in enumerate(columns)}
