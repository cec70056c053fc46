"""Binary concrete (Gumbel) masks: 0/1 masks that still carry a gradient (paper, section 1.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

ConcreteMode = Literal["hard", "soft", "sigmoid", "logits"]
_EPS = 1e-8  # inside the logarithms of the uniform noise, as published


@dataclass(frozen=True, kw_only=True)
class ConcreteConfig:
    """How a concrete head turns logits into masks."""

    mode: ConcreteMode = "hard"
    """``hard``: 0/1, straight-through gradient. ``soft``: relaxed sample. ``sigmoid``, ``logits``: no sampling."""

    temperature: float | None = 0.1
    """Temperature of the relaxation; None makes it a learned scalar that starts at 0.1."""

    def __post_init__(self) -> None:
        if self.mode not in ("hard", "soft", "sigmoid", "logits"):
            raise ValueError(f"concrete mode {self.mode!r}: use hard, soft, sigmoid or logits")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"concrete temperature {self.temperature}: use a number above 0, or None to learn it")


def concrete_sample(logits: Tensor, uniform: Tensor, temperature: Tensor | float, *, hard: bool) -> Tensor:
    """One sample of the binary concrete distribution.

    ``logits`` and ``uniform`` (noise in [0, 1)) have one shape, which is the shape of the result, in [0, 1].  ``hard``
    rounds the sample to 0 or 1 and keeps the gradient of the soft one.
    """
    noise = torch.log(uniform + _EPS) - torch.log(1 - uniform + _EPS)
    soft = torch.sigmoid((logits + noise) / temperature)
    if not hard:
        return soft
    return (soft > 0.5).to(soft) + (soft - soft.detach())


class ConcreteHead(nn.Module):
    """The masker's last convolution, which the masker applies, and the rule from logits to masks.

    Tensors are called ``conv.*`` as published.
    """

    def __init__(self, channels: int, config: ConcreteConfig) -> None:
        super().__init__()
        self.config = config
        self.conv = nn.Conv2d(channels, 1, kernel_size=3, padding=1)
        self.tau = nn.Parameter(torch.tensor(0.1)) if config.temperature is None else None

    def masks(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits -> masks of the same shape: sampled in train mode, without noise in eval mode (hard: logit > 0)."""
        mode = self.config.mode
        if mode == "logits":
            return logits
        if mode == "sigmoid":
            return torch.sigmoid(logits)
        temperature = self.config.temperature if self.tau is None else self.tau
        assert temperature is not None
        if self.training:
            uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
            return concrete_sample(logits, uniform, temperature, hard=mode == "hard")
        return (logits > 0).to(logits) if mode == "hard" else torch.sigmoid(logits / temperature)
