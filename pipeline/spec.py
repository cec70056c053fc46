"""What `model.json` holds: everything that evaluation, export and serving must know of a trained model besides its weights."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

FORMAT = "onepass-saliency/1"
"""The bundle format; a reader refuses any other."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tap(_Record):
    """One feature map of the classifier that the masker may read."""

    layer: int = Field(ge=0)
    """Position in the classifier's pyramid, 0 = the finest; names the masker's tensors (`conv1x1_{layer}`)."""
    module: str
    """Name of the classifier's module whose output is read."""
    channels: int = Field(ge=1)
    height: int = Field(ge=1)
    """Height of the map in cells, at the model's input size."""
    width: int = Field(ge=1)
    """Width of the map in cells, at the model's input size."""


class BackboneSpec(_Record):
    """A classifier and the places where its feature maps are read."""

    source: Literal["torchvision", "timm"]
    name: str
    """The model's name there, such as `resnet50` or `mobilenetv2_100`."""
    arguments: dict[str, Any] = {}
    """Further arguments of the model's constructor (`--init-arg K=V`)."""
    outputs: int = Field(ge=2)
    """Number of classes of the classifier's head."""
    taps: tuple[Tap, ...]
    """The maps that the masker reads, finest first."""
    batchnorm: Literal["eval", "train", "sync"] = "eval"
    """How the classifier's BatchNorm behaved in training: frozen statistics, statistics of each worker's share of the batch, or of all workers."""


class MaskerSpec(_Record):
    """The arguments of `pipeline.masker.Masker` beside the taps."""

    width: int = Field(default=64, ge=1)
    """Channels to which each map is projected."""
    target_area: bool = False
    """Whether the masker takes the wanted mask area as an input."""
    class_conditional: bool = False
    """Whether the masker takes the class to explain as an input."""
    concrete: dict[str, Any] | None = None
    """Arguments of the binary-concrete head; none for the plain sigmoid."""
    upsampling: Literal["nearest", "bilinear"] = "nearest"
    """How the native mask becomes a mask of the input size."""

    @property
    def binary(self) -> bool:
        """Whether masks hold only 0 and 1."""
        from pipeline.concrete import (
            ConcreteConfig,
        )  # only here: it needs PyTorch, and whoever reads model.json may not

        return self.concrete is not None and ConcreteConfig(**self.concrete).binary


class ModelSpec(_Record):
    """`model.json`, whole."""

    format: Literal["onepass-saliency/1"] = FORMAT
    backbone: BackboneSpec
    masker: MaskerSpec
    preset: str
    """Name of the preset that the model was trained with, or `published` for an imported checkpoint."""
    input_size: int = Field(ge=16)
    """Side of the square network input, in pixels."""
    mask_size: int = Field(ge=1)
    """Side of the native mask, in cells."""
    geometry: Literal["squash", "crop"] = "squash"
    """How a picture is fitted to the input: the whole picture squashed to the square, or its centre."""
    mean: tuple[float, float, float]
    """Mean of R, G and B on the scale 0..1: the network sees (x / 255 - mean) / std."""
    std: tuple[float, float, float]
    """Standard deviation of R, G and B on the scale 0..1."""
    class_names: list[str]
    """Names of the classifier's outputs; `class_names[k]` belongs to logit k."""
    data_classes: list[str]
    """Names of the folders of the training set, in the order of its labels."""
    class_index: list[int]
    """For each folder of the training set, the logit that stands for it."""
    training: dict[str, Any] = {}
    """Provenance: settings, seed, steps, wall time, versions, data."""
    metrics: dict[str, Any] = {}
    """Figures on the validation split at the end of training."""
    mask_statistics: dict[str, Any] = {}
    """Area, entropy and off-centre mass of the masks of training images: the reference for drift."""

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        if len(self.class_names) != self.backbone.outputs:
            raise ValueError(f"{len(self.class_names)} class names for {self.backbone.outputs} outputs")
        if len(self.data_classes) != len(self.class_index):
            raise ValueError(f"{len(self.data_classes)} data classes for {len(self.class_index)} class indices")
        outside = [k for k in self.class_index if not 0 <= k < self.backbone.outputs]
        if outside:
            raise ValueError(f"class index {outside[0]} is not among the {self.backbone.outputs} outputs")
        return self
