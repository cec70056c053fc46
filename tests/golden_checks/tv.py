"""Section 2: total variation alone."""

from __future__ import annotations

import torch

from pipeline.objectives import total_variation
from tests.golden_checks._golden import GoldenFile, assert_close


def check(golden: GoldenFile) -> None:
    for i, case in enumerate(golden.json("cases_json")):
        mask = torch.from_numpy(golden[f"mask_{i}"]).requires_grad_()
        assert list(mask.shape) == case["shape"] and str(mask.dtype) == f"torch.{case['dtype']}", f"case {i}"
        tolerance = 1e-6 if case["dtype"] == "float32" else 1e-9
        loss = case["tv_weight"] * total_variation(mask, power=case["power"], border=case["border_penalty"])
        loss.backward()
        assert mask.grad is not None
        assert_close(loss, golden[f"loss_{i}"], tolerance, f"loss_{i}")
        assert_close(mask.grad, golden[f"grad_{i}"], tolerance, f"grad_{i}")
