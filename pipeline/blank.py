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


def blank_answer(judge: nn.Module, blank: Tensor) -> Tensor:
    """(C,) log-probabilities."""
    training = judge.training
    judge.eval()
    log_q = F.log_softmax(wide(judge(blank).logits), 1)[0]
    judge.train(training)
    return log_q


def unit_of(answer: Tensor) -> Tensor:
    """() entropy of the `blank_answer`, in nats, at least a quarter of log C."""
    return (-(answer.exp() * answer).sum()).clamp(min=SMALLEST_UNIT * math.log(len(answer)))


def blank_loss(judge: nn.Module, blank: Tensor, classes: Tensor | None) -> Tensor:
    """() cross-entropy of the answer to a blank picture with all ``classes`` alike, an int64 vector of outputs; none: all."""
    answer = blank_answer(judge, blank)
    return -(answer if classes is None else answer[classes]).mean()
