"""Section 10: the Gaussian blur fill."""

from __future__ import annotations

import torch

from pipeline.fills import Blur
from tests.golden_checks._golden import GoldenFile, assert_close


def check(golden: GoldenFile) -> None:
    for i in range(len(golden) // 3):
        x = torch.from_numpy(golden[f"x_{i}"])
        filled = Blur(sigma=float(golden[f"sigma_{i}"])).content(x, torch.zeros_like(x[:, :1]))
        assert_close(filled, golden[f"out_{i}"], 1e-5, f"out_{i}")
