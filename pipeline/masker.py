"""The masker: reads a classifier's feature maps, answers where the evidence is (paper, section 2).

Tensor names are those of the published checkpoints (``conv1x1_3.0.weight``, ``final.0.weight``, ...), so that their
state dicts load as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.concrete import ConcreteConfig, ConcreteHead

CLASS_CHANNELS = 64  # width of the class embedding
Upsampling = Literal["nearest", "bilinear"]


def default_mask_size(input_size: int) -> int:
    """Native mask size for a square input: a quarter of it, 56 for 224 as published."""
    return math.ceil(input_size / 4)


class ClassEmbedding(nn.Module):
    """One learned row per class, kept under the published name ``class_module.embedding.weight``."""

    def __init__(self, class_count: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(class_count, CLASS_CHANNELS)

    def forward(self, labels: Tensor) -> Tensor:
        """``labels`` (N,) -> (N, 64, 1, 1)."""
        return self.embedding(labels)[:, :, None, None]


class Masker(nn.Module):
    """Feature maps of a classifier -> one mask per image, at the masker's native resolution.

    Every tapped layer goes through 1x1 conv, norm and ReLU to ``width`` channels and is up-sampled bilinearly to
    ``mask_size``; the stack goes through one 3x3 conv to one logit per cell.  Layer 0 joins the stack as it is when it
    already has ``width`` channels and is not alone (the published rule; ``raw_first`` overrides it).

    Computed in another order: each layer's part of the 3x3 conv is applied as nine 1x1 filters, one per place of its
    window, on the small maps; nine channels are up-sampled instead of ``width``, shifted to their places and added.  All
    of it is linear, so the logits are the same but for rounding, at a fifth of the time.

    taps: layer index -> channels of its map.  mask_size: (height, width) of the mask.  target_area: one more constant
    channel per layer, the wanted mask area.  class_count: 64 more constant channels per layer, the class's embedding.
    concrete: the Gumbel head instead of the plain one.  upsample: how the native mask is brought to the size of the
    image; the masker only stores it.  norm: makes a normalisation layer for a number of channels.
    """

    def __init__(
        self,
        *,
        taps: Mapping[int, int],
        mask_size: tuple[int, int],
        width: int = 64,
        target_area: bool = False,
        class_count: int | None = None,
        concrete: ConcreteConfig | None = None,
        upsample: Upsampling = "nearest",
        raw_first: bool | None = None,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if not taps:
            raise ValueError("a masker needs at least one tapped layer")
        if upsample not in ("nearest", "bilinear"):
            raise ValueError(f"mask up-sampling {upsample!r}: use nearest or bilinear")
        self.layers = tuple(sorted(taps))
        self.mask_size = tuple(mask_size)
        self.target_area = target_area
        self.upsample: Upsampling = upsample
        if raw_first is None:
            raw_first = len(taps) > 1 and taps.get(0) == width
        self.raw = {0} & set(taps) if raw_first else set()
        extra = int(target_area) + (CLASS_CHANNELS if class_count else 0)
        self.widths: list[int] = []  # channels of each layer in the stack
        for layer in self.layers:
            if layer in self.raw:
                self.widths.append(taps[layer] + extra)
                continue
            conv = nn.Conv2d(taps[layer] + extra, width, kernel_size=1, bias=False)
            setattr(self, f"conv1x1_{layer}", nn.Sequential(conv, norm(width), nn.ReLU()))
            self.widths.append(width)
        stacked = sum(self.widths)
        self.final = ConcreteHead(stacked, concrete) if concrete else nn.Sequential(nn.Conv2d(stacked, 1, 3, padding=1))
        self.class_module = ClassEmbedding(class_count) if class_count else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # published initialisation; biases and norms keep PyTorch's
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))

    @property
    def last(self) -> nn.Conv2d:
        """The 3x3 convolution that gives the logits."""
        last = self.final.conv if isinstance(self.final, ConcreteHead) else self.final[0]
        assert isinstance(last, nn.Conv2d)
        return last

    def forward(
        self, features: Mapping[int, Tensor], *, target_area: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Logits (N, 1, h, w), before the sigmoid.

        ``features[i]`` (N, C_i, h_i, w_i); maps of layers that are not tapped are ignored.  Gradients flow into the
        maps unless the caller detaches them.  ``target_area`` (N,) in [0, 1]; ``labels`` (N,) int64.
        """
        constants = self._constants(features[self.layers[0]], target_area, labels)
        last = self.last
        windows = last.weight[0].flatten(1).split(self.widths)  # per layer (channels, 9)
        summed: Tensor | None = None
        for layer, window in zip(self.layers, windows, strict=True):
            maps = features[layer]
            if constants is not None:
                maps = torch.cat([maps, constants.expand(-1, -1, *maps.shape[2:])], dim=1)  # (N, C_i + extra, h_i, w_i)
            if layer not in self.raw:
                maps = getattr(self, f"conv1x1_{layer}")(maps)  # (N, width, h_i, w_i)
            maps = F.conv2d(maps, window.t()[:, :, None, None])  # (N, 9, h_i, w_i)
            if tuple(maps.shape[2:]) != self.mask_size:
                maps = F.interpolate(maps, size=self.mask_size, mode="bilinear", align_corners=False)
            summed = maps if summed is None else summed + maps
        assert summed is not None
        places = torch.eye(9, dtype=summed.dtype, device=summed.device).view(1, 9, 3, 3)  # channel k: window's place k
        return F.conv2d(summed, places, last.bias, padding=1)  # (N, 1, h, w)

    def masks(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits -> masks in [0, 1] of the same shape; a concrete head in train mode samples from ``generator``."""
        if isinstance(self.final, ConcreteHead):
            return self.final.masks(logits, generator)
        return torch.sigmoid(logits)

    def _constants(self, like: Tensor, target_area: Tensor | None, labels: Tensor | None) -> Tensor | None:
        """The channels that are constant over space, (N, extra, 1, 1), or None."""
        if (target_area is not None) != self.target_area:
            raise ValueError("target_area must be passed to a masker that was built with it, and to no other")
        if (labels is not None) != (self.class_module is not None):
            raise ValueError("labels must be passed to a masker that was built with class_count, and to no other")
        parts = []
        if target_area is not None:
            parts.append(target_area.to(like)[:, None, None, None])
        if self.class_module is not None:
            parts.append(self.class_module(labels).to(like))
        return torch.cat(parts, dim=1) if parts else None
