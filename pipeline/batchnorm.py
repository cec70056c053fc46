"""BatchNorm over the global batch, on any backend (PyTorch's own SyncBatchNorm refuses CPU tensors)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.collective import differentiable_sum, world_size


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """`BatchNorm2d` whose statistics in train mode are those of all workers' images together.

    State dict and behaviour with one worker are those of `BatchNorm2d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``input``: (N, C, h, w), any N on each worker."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        return synchronised_batch_norm(self, input)


def synchronised_batch_norm(module: _BatchNorm, x: Tensor) -> Tensor:
    """Normalise ``x`` (N, C, h, w) by the mean and variance over all workers, and move ``module``'s running statistics."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    count = wide.new_full((1,), float(wide.numel() // wide.shape[1]))
    sums = differentiable_sum(torch.cat([wide.sum((0, 2, 3)), count]))  # (C + 1,)
    total = sums[-1].detach()
    mean = sums[:-1] / total  # (C,)
    centred = wide - mean[None, :, None, None]
    variance = differentiable_sum(centred.square().sum((0, 2, 3))) / total  # (C,), biased; two passes keep it exact
    if module.running_mean is not None and module.running_var is not None:
        with torch.no_grad():
            if module.num_batches_tracked is not None:
                module.num_batches_tracked.add_(1)
            momentum = 1 / float(module.num_batches_tracked or 1) if module.momentum is None else module.momentum
            module.running_mean.lerp_(mean.to(module.running_mean), momentum)
            unbiased = variance * total / (total - 1).clamp(min=1)
            module.running_var.lerp_(unbiased.to(module.running_var), momentum)
    y = centred * torch.rsqrt(variance + module.eps)[None, :, None, None]
    if module.affine:
        y = y * module.weight[None, :, None, None] + module.bias[None, :, None, None]
    return y.to(x.dtype)


def synchronise(network: nn.Module) -> None:
    """Turn every BatchNorm of ``network`` into one over all workers, in place; weights and names stay."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm2d
        elif isinstance(module, nn.BatchNorm2d) and not isinstance(module, SyncedBatchNorm2d):
            # timm's BatchNorm with an activation behind it
            kind = type(module)

            def forward(self, x: Tensor, _plain=kind.forward) -> Tensor:
                if not self.training or world_size() == 1:
                    return _plain(self, x)
                return self.act(self.drop(synchronised_batch_norm(self, x)))

            module.__class__ = type(f"Synced{kind.__name__}", (kind,), {"forward": forward})


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Within: BatchNorm layers in train mode leave their running statistics alone.

    The statistics that the classifier is used with are those of whole pictures; masked ones must not shift them.
    """
    layers = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
