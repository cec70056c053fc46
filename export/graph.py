"""The deployable graph: bytes of pixels in, class logits and native mask out, everything between them inside.

`image` (N, H, W, 3) uint8 RGB -> `logits` (N, C) float32, `mask` (N, h, w) float32 in [0, 1] (or uint8, 255 = 1).
The network itself knows nothing of this; a runtime needs nothing else.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.errors import UsageError
from pipeline.masker import Upsampling
from pipeline.masking import upsample
from pipeline.model import SaliencyModel
from pipeline.spec import ModelSpec

MaskDtype = Literal["float", "uint8"]


@dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """What the deployable graph offers beside class logits and native mask."""

    mask_dtype: MaskDtype = "float"
    """`float`: values in [0, 1]. `uint8`: round(255 x), four times less to copy and what is stored anyway."""

    upsampled: bool = False
    """One more output `mask_upsampled` (N, S, S): the mask at the input's size, as the masker up-samples it."""

    resize: bool = False
    """The image may have any height and width; it is squashed to the network's input inside the graph."""

    dynamic_size: bool = False
    """The network itself runs at the size of the image that is given (convolutional classifiers only)."""

    topk: int = 0
    """For class-conditional maskers: further outputs `topk_labels` (N, k) int64 and `topk_masks` (N, k, h, w)."""

    target_area: float | None = None
    """For maskers that take the wanted mask area: the area that is built into the graph, in [0, 1]."""

    def __post_init__(self) -> None:
        if self.mask_dtype not in ("float", "uint8"):
            raise UsageError(f"--mask-dtype {self.mask_dtype}: use float or uint8")
        if self.resize and self.dynamic_size:
            raise UsageError("--resize and --dynamic-size exclude each other: one resizes every image, the other none")
        if self.target_area is not None and not 0 <= self.target_area <= 1:
            raise UsageError(f"--target-area {self.target_area}: use a share of the image between 0 and 1")
        if self.topk < 0:
            raise UsageError(f"--topk {self.topk}: use a number of classes, 0 for none")

    @property
    def output_names(self) -> list[str]:
        """The graph's outputs in order."""
        further = ["mask_upsampled"] if self.upsampled else []
        return ["logits", "mask", *further, *(["topk_labels", "topk_masks"] if self.topk else [])]


class DeployableGraph(nn.Module):
    """Cast, layout, (resize,) normalisation, network, mask; see the module's docstring."""

    scale: Tensor
    shift: Tensor

    def __init__(self, *, model: SaliencyModel, spec: ModelSpec, config: GraphConfig | None = None) -> None:
        super().__init__()
        self.config = config or GraphConfig()
        self.input_size = spec.input_size
        self.upsampling: Upsampling = spec.masker.upsampling
        if self.config.topk and not spec.masker.class_conditional:
            raise UsageError(f"--topk {self.config.topk}: this masker is not class-conditional; leave the flag out")
        if self.config.topk > spec.backbone.outputs:
            raise UsageError(f"--topk {self.config.topk}: the classifier has {spec.backbone.outputs} classes")
        if self.config.target_area is not None and not spec.masker.target_area:
            raise UsageError("--target-area: this masker does not take the wanted area; leave the flag out")
        self.target_area = _wanted_area(spec, self.config) if spec.masker.target_area else None
        self.model = _with_plain_pooling(model)
        if self.config.dynamic_size:
            self.model.masker.mask_size = _NeverEqual(self.model.masker.mask_size)
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        # (x / 255 - mean) / std as one multiplication and one addition
        self.register_buffer("scale", (1 / (255 * std)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """``image``: (N, H, W, 3) uint8.  Returns the outputs named by `GraphConfig.output_names`."""
        pixels = image.float()  # first, because TensorRT takes uint8 into no other operator
        if self.config.resize:
            pixels = _squash(pixels, self.input_size)  # (N, S, S, 3)
        x = pixels.permute(0, 3, 1, 2) * self.scale + self.shift  # (N, 3, S, S), normalised
        logits, features = self.model.backbone(x)  # (N, C)
        conditional = self.model.masker.class_module is not None
        mask = self._mask(features, logits.argmax(1) if conditional else None)  # (N, 1, h, w)
        outputs = [logits, self._as_output(mask.squeeze(1))]
        if self.config.upsampled:
            full = upsample(mask, (x.shape[2], x.shape[3]), self.upsampling)  # (N, 1, S, S)
            outputs.append(self._as_output(full.squeeze(1)))
        if self.config.topk:
            labels = logits.topk(self.config.topk, dim=1).indices  # (N, k)
            masks = [self._mask(features, labels[:, rank]) for rank in range(self.config.topk)]
            outputs += [labels, self._as_output(torch.cat(masks, dim=1))]
        return tuple(outputs)

    def _mask(self, features: dict[int, Tensor], labels: Tensor | None) -> Tensor:
        area = None
        if self.target_area is not None:
            some = next(iter(features.values()))
            area = some.new_full((1,), self.target_area).expand(some.shape[0])
        return self.model.masker.masks(self.model.masker(features, target_area=area, labels=labels))

    def _as_output(self, mask: Tensor) -> Tensor:
        if self.config.mask_dtype == "uint8":
            return torch.round(mask * 255).to(torch.uint8)
        return mask


def _wanted_area(spec: ModelSpec, config: GraphConfig) -> float:
    """The area asked for, else the mean area of the masks of training images, else half the picture."""
    if config.target_area is not None:
        return config.target_area
    return float(spec.mask_statistics.get("area", {}).get("mean", 0.5))


class _NeverEqual(tuple):
    """A size that equals no other, so that the masker resizes every map: whether it has to must not be traced."""

    def __eq__(self, other: object) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        return True

    __hash__ = tuple.__hash__


class _GlobalMean(nn.Module):
    """Mean over height and width, kept as (N, C, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


def _with_plain_pooling(model: SaliencyModel) -> SaliencyModel:
    """A copy in which adaptive pooling to one cell is a mean: the exporter turns the former into strided gathers."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _GlobalMean())
    return model


def _squash(pixels: Tensor, size: int) -> Tensor:
    """Antialiased bilinear resize of (N, H, W, 3) in 0..255 to (N, size, size, 3), rounded to whole levels.

    Two matrix products with triangle weights instead of ONNX's Resize, whose antialiasing TensorRT does not have; the
    result is Pillow's within one level.  A product of 1080p by 224 costs less than one layer of the network.
    """
    rows = _triangle(pixels.shape[1], size).to(pixels.device)  # (size, H)
    columns = _triangle(pixels.shape[2], size).to(pixels.device)  # (size, W)
    planes = pixels.permute(0, 3, 1, 2)  # (N, 3, H, W)
    small = torch.matmul(torch.matmul(rows, planes), columns.transpose(0, 1))  # (N, 3, size, size)
    return torch.round(small).clamp(0, 255).permute(0, 2, 3, 1)


def _triangle(source: int, target: int) -> Tensor:
    """Weights (target, source) of the antialiased bilinear filter; rows sum to one."""
    step = torch.full((), 1.0) * source / target  # source pixels per target pixel
    support = torch.clamp(step, min=1.0)
    centres = (torch.arange(target, dtype=torch.float32) + 0.5) * step
    places = torch.arange(source, dtype=torch.float32) + 0.5
    weights = torch.clamp(1 - (places[None, :] - centres[:, None]).abs() / support, min=0)
    return weights / weights.sum(1, keepdim=True)


def example_images(spec: ModelSpec, config: GraphConfig, *, seed: int = 0) -> Tensor:
    """Two random images (2, H, W, 3) uint8 of a size that the graph takes; of one, the exporter would fix the batch."""
    generator = torch.Generator().manual_seed(seed)
    height = width = spec.input_size
    if config.resize or config.dynamic_size:  # unequal, and unequal to the input's, or they would be taken for fixed
        height, width = 2 * spec.input_size + 32, 2 * spec.input_size + 64
    return torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=generator)
