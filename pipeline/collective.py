"""Sums over the workers of a training run; with a single worker they are what they were."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of workers."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This worker's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def sum_in_place(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all workers, in one message.

    Every worker passes tensors of the same shapes and type in the same order.
    """
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    offset = 0
    for tensor in tensors:
        tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
        offset += tensor.numel()


class _DifferentiableSum(torch.autograd.Function):
    """y = sum over workers of x; since every worker's loss depends on y, so does the gradient sum over workers."""

    @staticmethod
    def forward(_ctx, x: Tensor) -> Tensor:
        y = x.clone()
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(_ctx, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def differentiable_sum(x: Tensor) -> Tensor:
    """Sum of ``x`` over all workers, through which gradients flow back to every worker; works on gloo and NCCL."""
    if world_size() == 1:
        return x
    return _DifferentiableSum.apply(x)  # pyright: ignore[reportReturnType]
