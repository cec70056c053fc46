"""Binary concrete (Gumbel) masks: 0/1 masks that still carry a gradient (paper, section 1.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

ConcreteMode = Literal["hard", "soft", "sigmoid", "logits"]
COLDEST = 1e-2
"""A learned temperature counts as at least this: at 0 and below there is no distribution."""
_EPS = 1e-8  # inside the logarithms of the uniform noise, as published


@dataclass(frozen=True, kw_only=True)
class ConcreteConfig:
    """How a concrete head turns logits into masks."""

    mode: ConcreteMode = "hard"
    """``hard``: 0/1, straight-through gradient. ``soft``: relaxed sample. ``sigmoid``, ``logits``: no sampling."""

    temperature: float | None = 0.1
    """Temperature of the relaxation; None makes it a learned scalar that starts at 0.1."""

    anneal: float = 0.75
    """Share of the training over which the noise comes in, the temperature falls from 1, and hard masks harden; 0: all at
    once, as published.  A frozen classifier recognises next to nothing in a picture with random holes, so masks that are
    0 and 1 from the first step on find no way to show enough, and shrink to nothing within ten steps."""

    shown: Literal["mean", "mode"] = "mean"
    """What a trained head answers with, where training saw samples: ``mean``, what they show on average, with the area that
    was paid for; ``mode``, as published, the likelier value of each cell.  That is 0 or 1 for hard masks, and may be 0
    everywhere though every sample showed something."""

    @property
    def binary(self) -> bool:
        """Whether a trained head's masks hold only 0 and 1."""
        return self.mode == "hard" and self.shown == "mode"

    def __post_init__(self) -> None:
        if self.shown not in ("mean", "mode"):
            raise ValueError(f"concrete shown {self.shown!r}: use mean or mode")
        if self.mode not in ("hard", "soft", "sigmoid", "logits"):
            raise ValueError(f"concrete mode {self.mode!r}: use hard, soft, sigmoid or logits")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"concrete temperature {self.temperature}: use a number above 0, or None to learn it")
        if not 0 <= self.anneal <= 1:
            raise ValueError(f"concrete anneal {self.anneal}: use a share of the training, from 0 to 1")


def concrete_sample(
    logits: Tensor, uniform: Tensor, temperature: Tensor | float, *, hard: bool, share: float = 1.0
) -> Tensor:
    """One sample of the binary concrete distribution.

    ``logits`` and ``uniform`` (noise in [0, 1)) have one shape, which is the shape of the result, in [0, 1].  ``hard``
    rounds the sample to 0 or 1 and keeps the gradient of the soft one.  ``share``: how far on the way from the plain
    sigmoid (0) to the distribution (1).
    """
    noise = torch.log(uniform + _EPS) - torch.log(1 - uniform + _EPS)
    soft = torch.sigmoid((logits + share * noise) / temperature**share)
    if not hard:
        return soft
    rounded = share * (soft > 0.5).to(soft) + (1 - share) * soft.detach()
    return rounded + (soft - soft.detach())


class ConcreteHead(nn.Module):
    """The masker's last convolution, which the masker applies, and the rule from logits to masks.

    Tensors are called ``conv.*`` as published.
    """

    def __init__(self, channels: int, config: ConcreteConfig) -> None:
        super().__init__()
        self.config = config
        self.conv = nn.Conv2d(channels, 1, kernel_size=3, padding=1)
        self.tau = nn.Parameter(torch.tensor(0.1)) if config.temperature is None else None
        self.course = 1.0  # share of the training that is done, in [0, 1]: whoever trains says so

    def masks(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits -> masks of the same shape: sampled in train mode, `ConcreteConfig.shown` in eval mode."""
        mode = self.config.mode
        if mode == "logits":
            return logits
        if mode == "sigmoid":
            return torch.sigmoid(logits)
        temperature = self.config.temperature if self.tau is None else self.tau.clamp(min=COLDEST)
        assert temperature is not None
        if self.training:
            uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
            # Slowly first: until masks have found their size, which takes a quarter of a short run, they need their gradient.
            share = min(self.course / self.config.anneal, 1.0) ** 3 if self.config.anneal else 1.0
            return concrete_sample(logits, uniform, temperature, hard=mode == "hard", share=share)
        if self.config.shown == "mode":
            return (logits > 0).to(logits) if mode == "hard" else torch.sigmoid(logits / temperature)
        # A hard sample is 1 with probability sigmoid(logit), whatever the temperature.  A soft one is the probability that a
        # second logistic variable, `temperature` wide, is exceeded, too: the sum of both is nearly logistic again.
        return torch.sigmoid(logits if mode == "hard" else logits / (1 + temperature**2) ** 0.5)
