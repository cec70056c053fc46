"""Does the classifier use what a map shows?  Insertion, deletion, drop, gain, pointing, completeness and soundness.

Definitions differ between papers in small ways that change the ranking of methods, so every choice is a field of
`Protocol` and is written beside the figures.  p is the softmax probability of the explained class on the image, o the one
on the image that the map lets through.

* insertion, deletion (Petsiuk et al. 2018): the pixels in the order of the map are restored to a blurred image, or
  replaced; area under the curve of p, by trapezoids, over the share of pixels.
* average drop, gain, increase (Chattopadhay et al. 2018, Zhang et al. 2024): mean of max(0, p - o) / p, mean of
  max(0, o - p) / (1 - p), share of images with o > p.
* pointing (Zhang et al. 2018): the highest cell lies on the object or near it; accuracy per class, then the mean.
* completeness, soundness (Gupta et al. 2022), with G_a the insertion AUC of class a into the replaced image:
  min(1, max(e, G) / min(alpha, p)) for the predicted class; min(1, max(beta, p_a) / G_a), the worst over all classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from pipeline.fills import FILLS
from pipeline.masking import mask_in
from pipeline.metrics.masks import upsample_nearest

Classify = Callable[[Tensor], Tensor]
"""Normalised images (N, 3, S, S) -> logits (N, C)."""

FAITHFULNESS = (
    "insertion", "deletion", "average_drop", "average_gain", "increase", "pointing", "completeness", "soundness",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The choices on which the figures depend."""

    class_rule: str = "predicted"
    """Whose probability: `predicted` on the clean image, or the true `label`."""
    fill: str = "zero"
    """What replaces a pixel: `zero`, the mean colour, or another fill without arguments."""
    insertion_blur: float = 5 / 224
    """Sigma of the blurred image that insertion starts from, as a share of the side."""
    steps: int = 28
    """Points of a curve after the first (8 rows a step at 224 pixels)."""
    scaling: str = "none"
    """Of the map before it is multiplied with the image: `none`, or `minmax` to [0, 1]."""
    tolerance: float = 15 / 224
    """How far from the object pointing may be, as a share of the side."""
    completeness_floor: float = 0.1
    completeness_ceiling: float = 1.0
    soundness_floor: float = 0.1
    seed: int = 0
    """Of the order among equal cells."""

    def __post_init__(self) -> None:
        for name, allowed in (("class_rule", ("predicted", "label")), ("scaling", ("none", "minmax")), ("fill", FILLS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; a curve needs at least 1")

    def describe(self) -> dict[str, object]:
        """The choices, and those that are not open: softmax over all outputs, ties in random order."""
        return {**asdict(self), "score": "softmax over all outputs", "ties": "random order by the seed"}


class Faithfulness:
    """Figures of one method, gathered batch by batch."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self._random = np.random.default_rng([protocol.seed, 0xFA17])
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in FAITHFULNESS}
        self._labels: list[np.ndarray] = []

    @torch.no_grad()
    def add(
        self,
        classify: Classify,
        x: Tensor,
        maps: np.ndarray,
        *,
        labels: np.ndarray,
        targets: Tensor,
        objects: Sequence[np.ndarray | None],
    ) -> None:
        """Add a batch.

        ``x``: (N, 3, S, S) normalised; ``maps``: (N, h, w) in [0, 1]; ``labels``: (N,) classes, by which pointing is
        averaged; ``targets``: (N,) their logits; ``objects``: (S, S) bool each, where the object is, None if not known.
        """
        protocol, size = self.protocol, x.shape[-1]
        full = upsample_nearest(maps, size)  # (N, S, S)
        ranks = torch.from_numpy(self._ranks(full)).to(x.device)  # (N, 1, S, S), 0 = the highest cell
        clean = classify(x).softmax(1)
        chosen = clean.argmax(1) if protocol.class_rule == "predicted" else targets
        replaced = FILLS[protocol.fill]().content(x, torch.zeros_like(x[:, :1])).expand_as(x)
        blurred = FILLS["blur"](sigma=protocol.insertion_blur * size).content(x, x[:, :1])

        inserted = self._curve(classify, ranks, shown=x, hidden=blurred)  # (N, C)
        removed = self._curve(classify, ranks, shown=replaced, hidden=x)
        certified = self._curve(classify, ranks, shown=x, hidden=replaced)
        kept = torch.from_numpy(self._scaled(full))[:, None].to(x)
        through = classify(mask_in(x, kept, replaced)).softmax(1)

        def of(values: Tensor) -> np.ndarray:
            return values.gather(1, chosen[:, None])[:, 0].double().cpu().numpy()

        p, o, g = of(clean), of(through), of(certified)
        floor, ceiling = protocol.completeness_floor, protocol.completeness_ceiling
        sound = (clean.clamp_min(protocol.soundness_floor) / certified.clamp_min(1e-12)).clamp_max(1.0)  # (N, C)
        columns = {
            "insertion": of(inserted),
            "deletion": of(removed),
            "average_drop": np.maximum(p - o, 0) / np.maximum(p, 1e-12),
            "average_gain": np.maximum(o - p, 0) / np.maximum(1 - p, 1e-12),
            "increase": (o > p).astype(float),
            "pointing": self._pointing(ranks[:, 0].cpu().numpy(), objects),
            "completeness": np.minimum(np.maximum(floor, g) / np.minimum(ceiling, np.maximum(p, 1e-12)), 1.0),
            "soundness": sound.amin(1).double().cpu().numpy(),
        }
        for name, values in columns.items():
            self._columns[name].append(values)
        self._labels.append(labels)

    def summary(self) -> dict[str, float | None]:
        """The figures, 0..1; None where nothing is known."""
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        labels = np.concatenate(self._labels)
        result: dict[str, float | None] = {name: float(values.mean()) for name, values in columns.items()}
        known = np.isfinite(columns["pointing"])
        per_class = [columns["pointing"][known & (labels == label)].mean() for label in np.unique(labels[known])]
        result["pointing"] = float(np.mean(per_class)) if per_class else None
        return result

    def _ranks(self, full: np.ndarray) -> np.ndarray:
        """The place of each pixel (N, 1, S, S) in the order from the highest; equal ones in random order."""
        flat = full.reshape(len(full), -1)
        order = np.lexsort((self._random.random(flat.shape), -flat), axis=1)
        ranks = np.empty_like(order)
        np.put_along_axis(ranks, order, np.arange(flat.shape[1])[None], axis=1)
        return ranks.reshape(len(full), 1, *full.shape[1:])

    def _curve(self, classify: Classify, ranks: Tensor, *, shown: Tensor, hidden: Tensor) -> Tensor:
        """Area (N, C) under the probabilities while ``shown`` replaces ``hidden`` from the highest pixel on."""
        steps, pixels = self.protocol.steps, ranks[0].numel()
        total = torch.zeros(())
        for step in range(steps + 1):
            image = torch.where(ranks < round(pixels * step / steps), shown, hidden)
            weight = 0.5 if step in (0, steps) else 1.0
            total = total.to(image) + weight * classify(image).softmax(1)
        return total / steps

    def _scaled(self, full: np.ndarray) -> np.ndarray:
        if self.protocol.scaling == "none":
            return full
        low, high = full.min(axis=(1, 2), keepdims=True), full.max(axis=(1, 2), keepdims=True)
        return (full - low) / np.maximum(high - low, 1e-12)

    def _pointing(self, ranks: np.ndarray, objects: Sequence[np.ndarray | None]) -> np.ndarray:
        """Whether the highest pixel is within the tolerance of the object, (N,); nan when that is not known."""
        limit = self.protocol.tolerance * ranks.shape[-1]
        hits = np.full(len(ranks), np.nan)
        for index, where in enumerate(objects):
            if where is not None and where.any():
                away = np.asarray(distance_transform_edt(~where))  # of each pixel from the object
                hits[index] = away[ranks[index] == 0].item() <= limit
        return hits
