"""What a classifier says of a picture with everything masked: the unit of the objectives, and what it should be.

``judge`` is a `pipeline.backbone` network, ``blank`` (1, 3, S, S) the picture; its answer is that with the statistics that
BatchNorm has collected.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST_UNIT = 0.25
"""The unit of the objectives is at least this share of log C."""


def wide(values: Tensor) -> Tensor:
    """Half-precision results of autocast as float32; anything else as it is."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


@torch.no_grad()
def unit_of(judge: nn.Module, blank: Tensor) -> Tensor:
    """() entropy of the answer to a blank picture, in nats, at least a quarter of log C."""
    log_q = _answer(judge, blank)
    return (-(log_q.exp() * log_q).sum()).clamp(min=SMALLEST_UNIT * math.log(log_q.shape[1]))


def blank_loss(judge: nn.Module, blank: Tensor, classes: Tensor | None) -> Tensor:
    """() cross-entropy of the answer to a blank picture with all ``classes`` alike, an int64 vector of outputs; none: all."""
    log_q = _answer(judge, blank)[0]
    return -(log_q if classes is None else log_q[classes]).mean()


def _answer(judge: nn.Module, blank: Tensor) -> Tensor:
    """(1, C) log-probabilities."""
    training = judge.training
    judge.eval()
    log_q = F.log_softmax(wide(judge(blank).logits), 1)
    judge.train(training)
    return log_q
