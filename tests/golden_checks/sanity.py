"""Section 9: similarity of two masks."""

from __future__ import annotations

import numpy as np

from pipeline.metrics.similarity import similarities
from tests.golden_checks._golden import GoldenFile, assert_close
from tests.golden_checks._inputs import blocks


def check(golden: GoldenFile) -> None:
    first, second = (blocks(golden[key].astype(np.float64) / 255) for key in ("mask_a_lr", "mask_b_lr"))
    found = [similarities(a, b) for a, b in zip(first, second, strict=True)]
    for name in found[0]:
        assert_close([pair[name] for pair in found], golden[name], 1e-6, name)
