"""What masks look like as a whole: the figures by which drift of explanations is noticed."""

from __future__ import annotations

import numpy as np

CENTRE_MARGIN = 33 / 224
"""The centre square leaves out this share of the picture on each side: it covers half of the area."""


def mask_statistics(masks: np.ndarray) -> dict[str, np.ndarray]:
    """Area, entropy and off-centre mass of each mask.

    ``masks``: (n, h, w) floats in [0, 1].  Each value is (n,): `area` the mean of the mask; `entropy` the mean binary
    entropy of its cells, in bits; `off_centre` the share of its mass outside the centre square (0 for an empty mask).
    """
    masks = np.asarray(masks, dtype=np.float64)
    height, width = masks.shape[1:]
    inside = np.clip(masks, 1e-12, 1 - 1e-12)
    entropy = -(inside * np.log2(inside) + (1 - inside) * np.log2(1 - inside))
    top, left = round(CENTRE_MARGIN * height), round(CENTRE_MARGIN * width)
    mass = masks.sum((1, 2))
    centre = masks[:, top : height - top, left : width - left].sum((1, 2))
    return {
        "area": masks.mean((1, 2)),
        "entropy": entropy.mean((1, 2)),
        "off_centre": np.where(mass > 0, 1 - centre / np.maximum(mass, 1e-12), 0.0),
    }


def summarise(statistics: dict[str, np.ndarray]) -> dict[str, dict[str, object]]:
    """Mean, standard deviation and a 20-bin histogram over [0, 1] of each figure: what `model.json` keeps."""
    return {
        name: {
            "mean": float(values.mean()),
            "std": float(values.std()),
            "histogram": np.histogram(values, bins=20, range=(0.0, 1.0))[0].tolist(),
        }
        for name, values in statistics.items()
    }
