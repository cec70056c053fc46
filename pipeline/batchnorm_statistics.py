"""BatchNorm statistics of a network whose weights were not trained with them: mixed from two others, or drawn anew."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def estimate_statistics(network: nn.Module, within: Sequence[nn.Module], x: Tensor, *, batch_size: int = 32) -> None:
    """Give the BatchNorm layers in the modules ``within`` of ``network`` the statistics of ``x``; no weight changes.

    ``network`` is in eval mode; ``x``: (n, 3, S, S) normalised, two images or more.  One pass in which these layers alone
    are in train mode and their averages are cumulative.
    """
    layers = [part for module in within for part in module.modules() if isinstance(part, _BatchNorm)]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
        layer.momentum = None
    for images in x.tensor_split(math.ceil(len(x) / batch_size)):  # no smaller last batch, which would count as much
        network(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
