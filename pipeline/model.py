"""Classifier and masker as one network: class and mask in one pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from pipeline.backbone import Backbone, build_backbone
from pipeline.concrete import ConcreteConfig
from pipeline.masker import Masker
from pipeline.spec import MaskerSpec, ModelSpec

DEFAULT_AREA = 0.5
"""The middle of the areas that a masker with a wanted area is trained with."""


class SaliencyModel(nn.Module):
    """A classifier and the masker that reads its feature maps (paper section 2)."""

    def __init__(self, *, backbone: Backbone, masker: Masker) -> None:
        super().__init__()
        self.backbone = backbone
        self.masker = masker

    def forward(
        self, x: Tensor, *, target_area: Tensor | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x``: (N, 3, S, S) normalised image.  Returns logits (N, C) and the mask (N, 1, h, w) in [0, 1], native.

        ``target_area`` (N,) in [0, 1] and ``labels`` (N,) are for maskers that are conditioned on them; without
        them the masks aim at half of the picture and explain the predicted class.
        """
        logits, features = self.backbone(x)
        if self.masker.target_area and target_area is None:
            target_area = x.new_full((len(x),), DEFAULT_AREA)
        if self.masker.class_module is not None and labels is None:
            labels = logits.argmax(1)
        mask_logits = self.masker(features, target_area=target_area, labels=labels)
        return logits, self.masker.masks(mask_logits)


def build_masker(
    spec: MaskerSpec,
    backbone: Backbone,
    *,
    mask_size: int,
    classes: int,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Masker:
    """The masker that ``spec`` describes for the taps of ``backbone``, freshly initialised."""
    return Masker(
        taps={tap.layer: tap.channels for tap in backbone.taps},
        mask_size=(mask_size, mask_size),
        width=spec.width,
        target_area=spec.target_area,
        class_count=classes if spec.class_conditional else None,
        concrete=ConcreteConfig(**spec.concrete) if spec.concrete else None,
        upsample=spec.upsampling,
        norm=norm,
    )


def build_model(spec: ModelSpec) -> SaliencyModel:
    """The model that ``spec`` describes, with fresh weights."""
    backbone = build_backbone(spec.backbone, spec.input_size)
    masker = build_masker(spec.masker, backbone, mask_size=spec.mask_size, classes=spec.backbone.outputs)
    return SaliencyModel(backbone=backbone, masker=masker)
