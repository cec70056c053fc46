"""What a masker has to beat: the whole image, a centred square, a centred Gaussian, and class activation maps.

A localisation figure means little beside nothing: objects are large and in the middle, so a blind guess does well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pipeline.backbone import Backbone
from pipeline.metrics.tally import Maps, PixelBox, maps_of_binary

CENTER_MARGIN = 33 / 224
"""Share of the side that the centre box leaves on every side (published: rows and columns 33..190 of 224)."""


def whole_box(size: int) -> PixelBox:
    """The whole input."""
    return (0, 0, size, size)


def center_box(size: int) -> PixelBox:
    """The centred square of about half the area."""
    margin = round(CENTER_MARGIN * size)
    return (margin, margin, size - margin, size - margin)


def box_maps(box: PixelBox, count: int, size: int) -> Maps:
    """``count`` times the same box, as a mask that is 1 inside and 0 outside."""
    x0, y0, x1, y1 = (round(edge) for edge in box)
    inside = np.zeros((size, size), dtype=bool)
    inside[y0:y1, x0:x1] = True
    binary = np.broadcast_to(inside, (count, size, size))
    return Maps(masks=binary.astype(np.float32), binary=binary, boxes=[box] * count)


def gaussian_mask(size: int) -> np.ndarray:
    """A centred round blob (size, size) float32 whose values are spread evenly over [0, 1] by rank.

    Only the order of a Gaussian of any width is left of it, so it is the centre prior for every threshold at once.
    """
    offsets = np.arange(size) - (size - 1) / 2
    distance = offsets[:, None] ** 2 + offsets**2
    ranks = rankdata(-distance).reshape(size, size)
    return ((ranks - 1) / (size * size - 1)).astype(np.float32)


def gaussian_maps(count: int, size: int) -> Maps:
    """``count`` times `gaussian_mask`, cut at its mean."""
    mask = gaussian_mask(size)
    masks = np.broadcast_to(mask, (count, size, size))
    return maps_of_binary(masks, np.broadcast_to(mask > mask.mean(), masks.shape), size)


class ClassActivation:
    """Class activation maps of any classifier, without touching it.

    The map of class c is the last spatial map A, each channel weighted with the mean over its cells of d logit_c / dA.
    Where the classifier ends in global average pooling and one linear layer, these weights are the layer's own (CAM,
    Zhou et al. 2016); for any other head this is Grad-CAM without its final rectification.  A transformer whose class
    token alone is read has no such gradient in its last block; then the deepest tapped map with one is taken.
    """

    def __init__(self, backbone: Backbone) -> None:
        graph_module = backbone.extractor
        if not isinstance(graph_module, fx.GraphModule):
            raise TypeError(f"class activation maps need a traced classifier, not {type(graph_module).__name__}")
        self._backbone = backbone
        self._module = graph_module
        self._source: fx.Node | None = None

    def __call__(self, x: Tensor, labels: Tensor | None = None) -> np.ndarray:
        """``x``: (N, 3, S, S) normalised; ``labels``: (N,) logit index, by default the predicted class.

        Returns (N, S, S) float32: the map stretched bilinearly to the input, its minimum moved to 0 and its maximum to
        1.  (Moving and scaling leave the cells above the mean the same.)
        """
        sources = [self._source] if self._source is not None else self._candidates(x[:1])
        maps = x.new_zeros(x.shape[0], 1, 1)
        with _frozen(self._module):
            for source in sources:
                weighted = self._weighted(source, x, labels)
                if weighted is not None:
                    maps, self._source = weighted, source
                    break
        stretched = F.interpolate(maps[:, None], size=x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
        low, high = stretched.amin((1, 2), keepdim=True), stretched.amax((1, 2), keepdim=True)
        return ((stretched - low) / (high - low).clamp_min(1e-12)).float().cpu().numpy()

    def _weighted(self, source: fx.Node, x: Tensor, labels: Tensor | None) -> Tensor | None:
        """The map (N, h, w) drawn from one node of the graph; None when its gradient is zero."""
        run = _RunFrom(self._module, source)
        with torch.enable_grad():
            logits = run.run(x)["logits"]
            chosen = logits.argmax(1) if labels is None else labels
            (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), run.leaf)
        value, slope = self._as_map(run.leaf.detach()), self._as_map(gradient)
        if not bool(slope.any()):
            return None
        return (value * slope.mean((2, 3), keepdim=True)).sum(1)

    def _candidates(self, x: Tensor) -> list[fx.Node]:
        """The node of the last spatial map, then the tapped maps from the deepest."""
        nodes = list(self._module.graph.nodes)
        results: Any = next(node for node in nodes if node.op == "output").args[0]
        taps = [results[f"layer_{tap.layer}"] for tap in reversed(self._backbone.taps)]
        recorder = _Shapes(self._module)
        with torch.no_grad():
            recorder.run(x)
        maps = [node for node in nodes if _is_map(recorder.shapes.get(node, ()))]
        # A transformer's only such map comes before its blocks; a convolutional network's comes last.
        last = [maps[-1]] if maps and nodes.index(maps[-1]) >= nodes.index(taps[0]) else []
        return last + [tap for tap in taps if tap not in last]

    def _as_map(self, value: Tensor) -> Tensor:
        """Maps, channels-last maps and tokens as (N, C, h, w)."""
        if value.ndim == 3:
            side = int(value.shape[1] ** 0.5)
            return value[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
        return value if value.shape[2] == value.shape[3] else value.permute(0, 3, 1, 2)


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape of what each node yields."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        return value


class _RunFrom(fx.Interpreter):
    """Runs a graph and lets gradients begin at one node, so that nothing before it is kept."""

    leaf: Tensor

    def __init__(self, module: fx.GraphModule, start: fx.Node) -> None:
        super().__init__(module)
        self._start = start

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n is self._start:
            value = self.leaf = value.detach().requires_grad_()
        return value


def _is_map(shape: Sequence[int]) -> bool:
    return len(shape) == 4 and (shape[2] == shape[3] > 1 or shape[1] == shape[2] > 1)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for the parameters, so that the part of the graph before the map records nothing."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
