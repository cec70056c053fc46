"""The same classifier, faster to train through: exact rewritings of its layers, in place.

* A BatchNorm with frozen statistics is an affine map per channel, so the convolution before it can do its work: its
  weights are scaled in each forward pass, gradients flow through the scaling to both, and one pass over the maps is
  saved, and another one backwards.
* oneDNN's backward pass of a strided depthwise convolution in bfloat16 is ten times slower than that of an unstrided one,
  of which it is every second cell: so it is computed as that.

Parameters, state dict and results (but for rounding) are those of the network as it was; the plain network is the oracle.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def accelerate(network: nn.Module) -> nn.Module:
    """Rewrite ``network`` in place where it can be; returns it.  Doing it twice changes nothing."""
    for graph_module in [m for m in network.modules() if isinstance(m, fx.GraphModule)]:
        for conv, norm in _pairs(graph_module):
            conv.__dict__["_norm"] = (norm,)  # in a tuple: not a part of the convolution's own state
            norm.__class__ = _kind(type(norm), _FoldedNorm)
            conv.__class__ = _kind(type(conv), _FoldingConv)
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d) and not isinstance(module, _FoldingConv) and _is_slow(module):
            module.__class__ = _kind(type(module), _PlainConv)
    return network


def _pairs(graph_module: fx.GraphModule) -> list[tuple[nn.Conv2d, _BatchNorm]]:
    """Convolutions whose output goes through one BatchNorm and nowhere else, in all of the module's graphs."""
    graphs = [
        graph for name in ("train_graph", "eval_graph") if (graph := getattr(graph_module, name, None)) is not None
    ]
    found: list[set[tuple[str, str]]] = []
    for graph in graphs or [graph_module.graph]:
        calls = [node for node in graph.nodes if node.op == "call_module"]
        once = {node.target for node in calls if sum(other.target == node.target for other in calls) == 1}
        pairs = set()
        for node in calls:
            before = node.args[0] if node.args else None
            if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
                continue
            if {node.target, before.target} <= once:
                pairs.add((str(before.target), str(node.target)))
        found.append(pairs)
    named = [
        (graph_module.get_submodule(conv), graph_module.get_submodule(norm))
        for conv, norm in sorted(set.intersection(*found))
    ]
    # Blocks that were not looked into when the network was traced, such as torchvision's Conv2dNormActivation.
    whole = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    for block in (m for name in sorted(whole) for m in graph_module.get_submodule(name).modules()):
        if isinstance(block, nn.Sequential):
            named += list(itertools.pairwise(block))
    result = []
    for conv, norm in named:
        foldable = isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats and not isinstance(norm, _FoldedNorm)
        if isinstance(conv, nn.Conv2d) and foldable and conv.padding_mode == "zeros":
            result.append((conv, norm))
    return result


def _kind(plain: type[nn.Module], mixin: type) -> type[Any]:
    """``plain`` with the forward pass of ``mixin``."""
    return type(plain.__name__, (mixin, plain), {"__module__": plain.__module__})


class _FoldedNorm:
    """A BatchNorm whose affine map the convolution before it has done already, unless it has statistics to take."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)  # pyright: ignore
        # timm's BatchNorm has an activation behind it.
        return self.act(self.drop(x)) if hasattr(self, "act") else x


class _PlainConv:
    """A convolution that avoids slow kernels."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return _convolve(self, x, self.weight, self.bias)


class _FoldingConv:
    """A convolution that does the work of the BatchNorm behind it while that one's statistics are frozen."""

    def forward(self: Any, x: Tensor) -> Tensor:
        norm = self._norm[0]
        if norm.training:
            return _convolve(self, x, self.weight, self.bias)
        scale = torch.rsqrt(norm.running_var + norm.eps)  # (C,)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        if self.bias is not None:
            shift = shift + self.bias * scale
        return _convolve(self, x, self.weight * scale[:, None, None, None], shift)


def _convolve(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What ``conv`` does, with another weight and bias."""
    padding = conv.padding
    if type(conv).__name__ == "Conv2dSame":  # timm's: padding that depends on the input's size
        from timm.layers.padding import pad_same

        x, padding = pad_same(x, conv.kernel_size, conv.stride, conv.dilation), (0, 0)
    half = x.dtype == torch.bfloat16 or (torch.is_autocast_enabled("cpu") and x.dtype == torch.float32)
    if x.device.type == "cpu" and half and x.requires_grad and _is_slow(conv):
        down, right = conv.stride
        return F.conv2d(x, weight, bias, 1, padding, conv.dilation, conv.groups)[:, :, ::down, ::right]
    return F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)


def _is_slow(conv: nn.Conv2d) -> bool:
    """Strided and depthwise."""
    return conv.groups > 1 and conv.groups == conv.in_channels and max(conv.stride) > 1 and conv.padding_mode == "zeros"
