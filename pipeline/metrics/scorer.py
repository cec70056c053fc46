"""One pass over labelled images: the maps of a model and of the baselines, each with a `Tally`, and what was measured how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.baselines import ClassActivation, box_maps, center_box, gaussian_maps, whole_box
from pipeline.bundle import Bundle
from pipeline.masking import upsample
from pipeline.metrics.boxes import Compat
from pipeline.metrics.examples import Example
from pipeline.metrics.faithfulness import Faithfulness, Protocol
from pipeline.metrics.intervals import LEVEL, RESAMPLES, intervals
from pipeline.metrics.saliency_metric import AREA_FLOOR, SaliencyMetric, saliency_metric
from pipeline.metrics.tally import PER_IMAGE, Maps, Tally, Truth, maps_of, top_correct
from pipeline.training import Normaliser

BASELINES = ("whole", "center", "gaussian", "cam")
BLIND = ("whole", "center", "gaussian")
"""Baselines that do not look at the image."""
Explain = Literal["predicted", "label"]
"""The class whose evidence a class-conditional masker is asked for."""
COMPARED = ("LE", "OM", "F1", "SM")
"""Metrics whose difference from each baseline is given, image by image."""


class Scorer:
    """Scores the masks of a bundle and of every baseline on batches of examples."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        judge: Bundle | None,
        compat: Compat = None,
        target_area: float = 0.5,
        explain: Explain = "predicted",
        baselines: Sequence[str] = BASELINES,
    ) -> None:
        """``judge``: whose classifier the Saliency Metric asks; None leaves it out.

        ``target_area``: the wanted area, for maskers that take one.  ``explain``: the class that class-conditional
        maskers are told.  ``baselines``: which of `BASELINES` to score as well.
        """
        self.spec = bundle.spec
        self.size = bundle.spec.input_size
        self.compat: Compat = compat
        self.target_area = target_area
        self.explain: Explain = explain
        self.baselines = tuple(name for name in BASELINES if name in baselines)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = bundle.model.to(self.device, memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]
        self.judge = judge
        if judge is not None:
            judge.model.to(self.device, memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]
        self.activation = ClassActivation(self.model.backbone)
        self.tallies = {name: Tally(size=self.size, compat=compat) for name in ("model", *self.baselines)}
        self.labels: list[int] = []

    def add(self, examples: Sequence[Example]) -> None:
        """Score a batch."""
        images = np.stack([example.image for example in examples])  # (N, S, S, 3) uint8
        labels = np.array([example.label for example in examples])
        x = Normaliser(self.spec.mean, self.spec.std, self.device)(images)
        targets = self.targets(self.spec.class_index, labels)
        logits, masks = self.look(x, targets)
        top1, top5 = top_correct(logits, targets)
        boxes, pixels = [example.boxes for example in examples], [example.mask for example in examples]
        truth = Truth(boxes=boxes, masks=pixels, top1=top1, top5=top5)
        for name, maps in self.maps(x, masks).items():
            granted = self.compat == "published" and name in BLIND
            self.tallies[name].add(
                maps,
                Truth(boxes=boxes, masks=pixels, top1=np.ones_like(top1), top5=top5) if granted else truth,
                self._saliency(maps, x, images, labels),
            )
        self.labels += labels.tolist()

    @torch.no_grad()
    def look(self, x: Tensor, targets: Tensor) -> tuple[Tensor, np.ndarray]:
        """Logits (N, C) and masks (N, h, w) float32 of normalised images (N, 3, S, S) of classes ``targets`` (N,).

        The masks have the native resolution, or that of the input where the model stretches them bilinearly.
        """
        masker = self.spec.masker
        conditions = {"target_area": x.new_full((len(x),), self.target_area)} if masker.target_area else {}
        if masker.class_conditional and self.explain == "label":
            conditions["labels"] = targets
        logits, masks = self.model(x, **conditions)
        if self.spec.masker.upsampling == "bilinear":
            masks = upsample(masks, (self.size, self.size), "bilinear")
        return logits, masks[:, 0].float().cpu().numpy()

    def maps(self, x: Tensor, masks: np.ndarray) -> dict[str, Maps]:
        """The maps of the model and of every baseline for one batch."""
        count, size = len(x), self.size
        make = {
            "whole": lambda: box_maps(whole_box(size), count, size),
            "center": lambda: box_maps(center_box(size), count, size),
            "gaussian": lambda: gaussian_maps(count, size),
            "cam": lambda: maps_of(self.activation(x), size, compat=self.compat),
        }
        return {
            "model": maps_of(masks, size, compat=self.compat),
            **{name: make[name]() for name in self.baselines},
        }

    def faithfulness(
        self, batches: Iterable[Sequence[Example]], protocol: Protocol
    ) -> dict[str, dict[str, float | None]]:
        """How faithful the maps of the model and of every baseline are to the model's own classifier."""
        backbone = self.model.backbone
        gathered = {name: Faithfulness(protocol) for name in self.tallies}
        for examples in batches:
            labels = np.array([example.label for example in examples])
            x = Normaliser(self.spec.mean, self.spec.std, self.device)(
                np.stack([example.image for example in examples])
            )
            targets = self.targets(self.spec.class_index, labels)
            for name, maps in self.maps(x, self.look(x, targets)[1]).items():
                gathered[name].add(
                    lambda images: backbone(images).logits,
                    x,
                    maps.masks,
                    labels=labels,
                    targets=targets,
                    objects=[example.where() for example in examples],
                )
        return {name: figures.summary() for name, figures in gathered.items()}

    def targets(self, class_index: Sequence[int], labels: np.ndarray) -> Tensor:
        """Logit indices (N,) of classes ``labels`` (N,) by a model's ``class_index``."""
        return torch.as_tensor(np.asarray(class_index)[labels], device=self.device)

    def _saliency(self, maps: Maps, x: Tensor, images: np.ndarray, labels: np.ndarray) -> SaliencyMetric | None:
        if self.judge is None:
            return None
        spec = self.judge.spec
        if (spec.mean, spec.std) != (self.spec.mean, self.spec.std):
            x = Normaliser(spec.mean, spec.std, self.device)(images)
        backbone = self.judge.model.backbone
        return saliency_metric(lambda cut: backbone(cut).logits, x, maps.boxes, self.targets(spec.class_index, labels))

    def tables(self) -> dict[str, dict[str, np.ndarray]]:
        """``model`` and each baseline -> metric -> (n,) value per image, nan where there is none."""
        return {name: tally.table() for name, tally in self.tallies.items()}

    def metrics(self, *, batch_size: int, seed: int) -> dict[str, Any]:
        """All figures, their intervals, and the paired differences from the baselines."""
        tables = self.tables()
        summaries: dict[str, dict[str, Any]] = {}
        for name, tally in self.tallies.items():
            summaries[name] = tally.summary(batch_size=batch_size)
            columns = {metric: tables[name][metric] for metric in PER_IMAGE}
            summaries[name]["intervals"] = intervals(columns, seed=seed)
        differences = {}
        for name in self.baselines:
            columns = {metric: tables["model"][metric] - tables[name][metric] for metric in COMPARED}
            ends = intervals(columns, seed=seed)
            differences[name] = {
                metric: {"value": float(np.nanmean(columns[metric])), "interval": ends[metric]}
                for metric in COMPARED
                if ends[metric] is not None
            }
        return {
            **summaries["model"],
            "differences": differences,
            "baselines": {name: summaries[name] for name in self.baselines},
        }

    def protocol(self, *, seed: int) -> dict[str, Any]:
        """How each figure was measured, in words."""
        published = self.compat == "published"
        judge = "left out" if self.judge is None else f"the classifier of {self.judge.path}"
        return {
            "geometry": self.spec.geometry,
            "input_size": self.size,
            "mask_size": self.spec.mask_size,
            "compat": self.compat,
            "target_area": self.target_area if self.spec.masker.target_area else None,
            "class_rule": f"top-1 over all {self.spec.backbone.outputs} outputs; the model's masks take no class"
            if not self.spec.masker.class_conditional
            else f"top-1 over all {self.spec.backbone.outputs} outputs; masks are of the {'predicted' if self.explain == 'predicted' else 'true'} class",
            "intervals": f"{LEVEL:.0%}, bootstrap over images, {RESAMPLES} resamples, seed {seed}",
            "differences": "model minus baseline on the same images, interval by the same resamples",
            "box": "largest 4-connected component of the cells above the mask's mean, tight box"
            + ("; loses its last row and column" if published else "; nothing above the mean: no box, a miss"),
            "LE": "share of images of which no true box has IoU > 0.5 with the one predicted box",
            "OM": "as LE, and top-1 must be right"
            + ("; taken as right for whole, center and gaussian" if published else " (the model's, for baselines too)"),
            "F1": "soft mask against each true box, the best one of an image; F1a: their mean",
            "true_boxes": "whole pixels, area beyond the input counted" if published else "clipped to the input",
            "SM": f"log(max(area, {AREA_FLOOR})) - log p(true class | box cut out, bicubic to the input); judge: {judge}",
            "sm_acc": "top-1 of the judge on the cut-outs, all outputs",
            "PxAP": f"thresholds every {self.tallies['model'].pixels.step}, pixels of all images pooled, 255 ignored",
            "MaxBoxAccV2": "100 thresholds of the map's maximum, any component, mean of IoU 0.3, 0.5 and 0.7, best threshold"
            " each",
            "mask_iou": "cells above the mean against the true mask, mean over images, 255 ignored",
            "mask_std": "of the masks' means, "
            + ("in each batch, averaged over batches" if published else "over all images"),
            "entropy": "bits a cell, -m log2 m" + ("" if published else " - (1-m) log2(1-m)"),
            "tv": "mean squared difference of neighbouring pixels, across plus down, at the input's resolution",
            "cam": "class activation map of the predicted class, bilinear, minimum subtracted, cut at its mean",
            "gaussian": "centred Gaussian by rank, cut at its mean",
        }
