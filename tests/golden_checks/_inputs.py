"""Inputs that several golden files describe by rule rather than store (the golden README's conventions)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

RESNET50_CHANNELS = {0: 64, 1: 256, 2: 512, 3: 1024, 4: 2048}


def blocks(low: np.ndarray, size: int = 224) -> np.ndarray:
    """(..., s, s) -> (..., size, size), each value a block."""
    times = size // low.shape[-1]
    return low.repeat(times, axis=-2).repeat(times, axis=-1)


def sum_blocks(full: Tensor, cells: int = 14) -> Tensor:
    """(N, 1, H, W) -> (N, cells, cells), the sum over each block."""
    return F.avg_pool2d(full, full.shape[-1] // cells, divisor_override=1)[:, 0]


def seeded_weights(module: nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Fill a masker by the weights rule of file 4; returns what was drawn, in float32."""
    stream = np.random.RandomState(seed)
    state = module.state_dict()
    drawn = {}
    for name in sorted(state):
        if name.endswith("num_batches_tracked"):
            continue
        t = stream.standard_normal(tuple(state[name].shape))
        if name.endswith("running_var"):
            t = 0.5 * np.abs(t) + 0.5
        elif name.endswith("running_mean"):
            t = 0.1 * t
        elif name.startswith("conv1x1_") and name.endswith(".1.weight"):
            t = 1 + 0.1 * t
        elif name.startswith("conv1x1_") and name.endswith(".1.bias"):
            t = 0.1 * t
        else:
            t = 0.05 * t
        drawn[name] = t.astype(np.float32)
    module.load_state_dict({name: torch.from_numpy(value) for name, value in drawn.items()}, strict=False)
    return drawn


def check_weights(drawn: dict[str, np.ndarray], expected: dict[str, dict[str, Any]], tolerance: float = 1e-4) -> None:
    """The tensors that the rule drew are those of the recording: names, shapes, sums, first values."""
    assert set(drawn) == set(expected), f"tensor names: {set(drawn) ^ set(expected)}"
    for name, value in drawn.items():
        record = expected[name]
        assert list(value.shape) == record["shape"], f"{name}: shape {value.shape}, golden {record['shape']}"
        assert abs(value.astype(np.float64).sum() - record["sum"]) < tolerance, f"{name}: sum"
        np.testing.assert_allclose(value.ravel()[:3], record["first"], rtol=0, atol=1e-6, err_msg=name)


def thinned(value: Tensor, limit: int) -> np.ndarray:
    """Tensors of ``limit`` or more values: every 97th, flattened; smaller ones whole."""
    array = value.detach().numpy()
    return array if array.size < limit else array.ravel()[::97]


def toy_logits(x: Tensor, weight: np.ndarray, bias: np.ndarray) -> Tensor:
    """The recording's classifier: 56x56 average pooling of (N, 3, 224, 224), then one linear layer."""
    return F.avg_pool2d(x, 56).flatten(1) @ torch.from_numpy(weight).to(x).T + torch.from_numpy(bias).to(x)
