"""A classifier whose feature maps can be read: any torchvision or timm model, at any input size.

The maps of a classifier form a *pyramid*, counted from the finest, 0, as the paper counts ResNet-50's (0: after the
stem's pooling, 1-4: the four stages; its final models tap 3 and 4, maps of 14 and 7 cells at 224 pixels).  Which layers
to tap follows from the size of the maps and not from their names: see `default_layers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import UsageError
from pipeline.spec import BackboneSpec, Tap

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

TAPPED_CELLS = (4, 16)
"""A tapped map is between these many cells wide: finer ones know too little, coarser ones say too little about where."""
MOST_TAPS = 3
RESNET_PYRAMID = ("maxpool", "layer1", "layer2", "layer3", "layer4")


class BackboneOutput(NamedTuple):
    """What one pass through the classifier yields."""

    logits: Tensor
    """(N, C)"""
    features: dict[int, Tensor]
    """layer -> (N, channels, height, width)"""


class Backbone(nn.Module):
    """A classifier that returns its logits together with the tapped feature maps.

    The names of its state dict are those of the wrapped model, prefixed with ``extractor.``.
    """

    def __init__(self, *, extractor: nn.Module, taps: Sequence[Tap], head: str | None, last_map: str | None) -> None:
        super().__init__()
        self.extractor = extractor
        self.taps = tuple(taps)
        self.head_name = head
        self.last_map_name = last_map

    @property
    def head(self) -> nn.Linear | None:
        """The linear layer that makes the logits, where the classifier ends in one."""
        module = self.extractor.get_submodule(self.head_name) if self.head_name else None
        return module if isinstance(module, nn.Linear) else None

    @property
    def last_map(self) -> nn.Module | None:
        """The module that makes the last spatial map before pooling: what class activation maps are drawn from."""
        return self.extractor.get_submodule(self.last_map_name) if self.last_map_name else None

    def forward(self, x: Tensor) -> BackboneOutput:
        """``x``: (N, 3, S, S) normalised image."""
        found = self.extractor(x)
        features = {tap.layer: _as_map(found[f"layer_{tap.layer}"], tap) for tap in self.taps}
        return BackboneOutput(found["logits"], features)


def _as_map(output: Tensor, tap: Tap) -> Tensor:
    """Tokens (N, T, C), channels-last maps (N, h, w, C) and ordinary maps (N, C, h, w), all as the latter."""
    if output.ndim == 3:
        cells = tap.height * tap.width
        tokens = output[:, output.shape[1] - cells :]  # class and register tokens stand in front
        return tokens.transpose(1, 2).reshape(output.shape[0], tap.channels, tap.height, tap.width)
    if output.shape[1] != tap.channels:
        return output.permute(0, 3, 1, 2)
    return output


def create_classifier(source: str, name: str, *, outputs: int, arguments: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised classifier of torchvision or timm.

    Raises:
        UsageError: no such model, or it does not take the arguments.
    """
    try:
        if source == "timm":
            import timm

            return timm.create_model(name, pretrained=False, num_classes=outputs, **arguments)
        from torchvision.models import get_model

        return get_model(name, weights=None, num_classes=outputs, **arguments)
    except (ValueError, RuntimeError, TypeError, AssertionError) as error:
        raise UsageError(
            f"cannot make the classifier {source}:{name} with {dict(arguments)}: {error}; "
            "check --init (a torchvision name, or timm:NAME) and --init-arg"
        ) from error


def default_normalisation(source: str, classifier: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (R, G, B on the scale 0..1) that the model's own weights were trained with."""
    if source == "timm":
        config: Any = getattr(classifier, "pretrained_cfg", None) or {}
        return tuple(config.get("mean", IMAGENET_MEAN)), tuple(config.get("std", IMAGENET_STD))
    return IMAGENET_MEAN, IMAGENET_STD


@torch.no_grad()
def pyramid(source: str, classifier: nn.Module, input_size: int) -> list[Tap]:
    """The classifier's feature maps, finest first, with their sizes at ``input_size``.

    ResNets give the paper's five; timm models what timm lists; any other model its last map at each resolution.
    A transformer, whose maps all have one size, gives the outputs of four evenly spaced blocks.

    Raises:
        UsageError: the classifier cannot take this input size.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str):
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                shapes.pop(name, None)  # keep the order of the last execution
                shapes[name] = tuple(output.shape)

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in classifier.named_modules() if name]
    training = classifier.training
    try:
        classifier.eval()(torch.zeros(1, 3, input_size, input_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UsageError(
            f"the classifier does not take {input_size} x {input_size} pixels: {str(error).splitlines()[0]}; "
            "give another --image-size, or the model's own option for it with --init-arg (such as img_size=...)"
        ) from error
    finally:
        classifier.train(training)
        for handle in handles:
            handle.remove()

    if all(name in shapes for name in RESNET_PYRAMID):
        names = list(RESNET_PYRAMID)
    elif source == "timm" and hasattr(classifier, "feature_info"):
        info: Any = classifier.feature_info  # pyright: ignore[reportAttributeAccessIssue]
        names = [entry["module"] for entry in getattr(info, "info", info)]
        if len({shapes[name][1:] for name in names}) == 1 and len(names) > 4:
            names = [names[(k + 1) * len(names) // 4 - 1] for k in range(4)]
    else:
        last_at = {shape[2]: name for name, shape in shapes.items() if _is_square_map(shape)}
        names = sorted(last_at.values(), key=lambda name: -shapes[name][2])
    return [_tap(layer, name, shapes[name]) for layer, name in enumerate(names)]


def _is_square_map(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[2] == shape[3] and shape[2] > 1


def _tap(layer: int, module: str, shape: tuple[int, ...]) -> Tap:
    if len(shape) == 3:  # tokens
        side = math.isqrt(shape[1])
        return Tap(layer=layer, module=module, channels=shape[2], height=side, width=side)
    if shape[2] != shape[3]:  # channels last
        return Tap(layer=layer, module=module, channels=shape[3], height=shape[1], width=shape[2])
    return Tap(layer=layer, module=module, channels=shape[1], height=shape[2], width=shape[3])


def default_layers(maps: Sequence[Tap]) -> tuple[int, ...]:
    """The layers that the masker reads: the deepest maps (at most three) that are 4 to 16 cells wide.

    For a ResNet this is {3, 4} at 224 pixels, as in the paper (14 and 7 cells), {2, 3} at 96 (12 and 6) and {1, 2, 3}
    at 64 (16, 8 and 4): what matters is how finely a map divides the picture, which its stride decides and its name not.
    """
    low, high = TAPPED_CELLS
    fitting = [tap.layer for tap in maps if low <= tap.height <= high]
    if not fitting:  # a very small or very large input: the map nearest to the paper's coarser one
        fitting = [min(maps, key=lambda tap: abs(math.log(tap.height / 7))).layer]
    sizes = {tap.height for tap in maps}
    return tuple(fitting[-(2 if len(sizes) == 1 else MOST_TAPS) :])


def choose_taps(maps: Sequence[Tap], layers: Sequence[int] | None) -> tuple[Tap, ...]:
    """The taps of ``layers``, or of `default_layers`.

    Raises:
        UsageError: a layer that the pyramid does not have.
    """
    chosen = tuple(sorted(layers)) if layers else default_layers(maps)
    missing = [layer for layer in chosen if layer not in range(len(maps))]
    if missing:
        there = ", ".join(f"{tap.layer} ({tap.module}, {tap.height} cells)" for tap in maps)
        raise UsageError(f"--layers {missing[0]} is not a layer of this classifier; it has {there}")
    return tuple(maps[layer] for layer in chosen)


def tap_classifier(source: str, classifier: nn.Module, taps: Sequence[Tap], *, last_map: str | None) -> Backbone:
    """Wrap ``classifier`` so that one pass returns its logits and the tapped maps; weights are shared, not copied."""
    nodes = {tap.module: f"layer_{tap.layer}" for tap in taps}
    if source == "timm":
        from timm.models._features_fx import create_feature_extractor, get_graph_node_names
    else:
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
    names = get_graph_node_names(classifier)
    nodes[names[1][-1]] = "logits"
    extractor = create_feature_extractor(classifier, nodes)
    head = next(
        (name for name, module in reversed(list(classifier.named_modules())) if isinstance(module, nn.Linear)), None
    )
    return Backbone(extractor=extractor, taps=taps, head=head, last_map=last_map)


def build_backbone(spec: BackboneSpec, input_size: int) -> Backbone:
    """The backbone that ``spec`` describes, with fresh weights."""
    classifier = create_classifier(spec.source, spec.name, outputs=spec.outputs, arguments=spec.arguments)
    maps = pyramid(spec.source, classifier, input_size)
    return tap_classifier(spec.source, classifier, spec.taps, last_map=maps[-1].module)
