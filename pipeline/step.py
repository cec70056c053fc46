"""One training step: clean, masked-in and masked-out pictures, two networks, gradients first and updates last.

This is the plain form, the oracle of any faster one.  It differs from the published step in two places, both on
purpose: every gradient is taken before any weight moves (the reference moves the classifier under the masker's
backward pass), and a drawn earlier classifier really judges the masks (the reference loads it and asks the current one).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import collective
from pipeline.area_price import next_price
from pipeline.batchnorm import frozen_statistics
from pipeline.fills import Fill
from pipeline.masking import mask_in, mask_out, upsample
from pipeline.model import SaliencyModel
from pipeline.objectives import SideTerms, side_loss
from pipeline.population import Population
from pipeline.presets import Preset

PUBLISHED_SIZE = 224
"""Input size for which the weights of TV are stated."""
SMALLEST_UNIT = 0.25
"""The unit of the objectives is at least this share of log C."""


class Batch(NamedTuple):
    """A worker's share of a global batch."""

    images: Tensor
    """(n, 3, S, S) normalised."""
    labels: Tensor
    """(n,) int64 logit indices."""


@dataclass
class Losses:
    """What one step computes before anything moves; sums over this worker's images divided by the global batch size."""

    masker: Tensor | None
    """What the masker minimises; none while the classifier is trained by itself."""
    classifier: Tensor | None
    """What the classifier minimises; none when it is frozen."""
    logs: dict[str, Tensor]
    """Scalars that add up over the workers."""


def _wide(values: Tensor) -> Tensor:
    """Half-precision results of autocast as float32; anything else as it is."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


class JointStep:
    """Computes losses and gradients of a step and carries them out."""

    def __init__(
        self,
        *,
        model: SaliencyModel,
        preset: Preset,
        fill: Fill,
        blank: Tensor,
        population: Population | None,
        batchnorm: str,
        trains_classifier: bool,
        autocast: torch.autocast | None = None,
        scratch: bool,
    ) -> None:
        """``blank``: (1, 3, S, S), the picture with everything masked.  ``scratch``: the classifier starts from random weights."""
        self.model = model
        self.preset = preset
        self.fill = fill
        self.blank = blank
        self.population = population
        self.autocast = autocast or nullcontext()
        self.price = preset.price.initial
        self.joint = preset.classifier == "joint"
        self.trains_classifier = trains_classifier
        self.batchnorm_trains = batchnorm != "eval"
        options = preset.optimisation
        self.scratch = scratch
        self.rate = options.scratch_rate if scratch else options.classifier_rate
        self.classifier_parameters = [p for p in model.backbone.parameters() if p.requires_grad]
        self.masker_parameters = list(model.masker.parameters())
        parameters = self.classifier_parameters or [nn.Parameter(torch.zeros(()))]
        if options.classifier_method == "sgd":
            self.classifier_optimiser = torch.optim.SGD(
                parameters, lr=self.rate, momentum=options.momentum, weight_decay=options.weight_decay
            )
        else:
            self.classifier_optimiser = torch.optim.Adam(parameters, lr=self.rate, weight_decay=options.weight_decay)
        self.masker_optimiser = torch.optim.Adam(
            self.masker_parameters, lr=options.masker_rate, weight_decay=options.weight_decay
        )

    # -- one step ---------------------------------------------------------------------------------------------------

    def __call__(self, batch: Batch, *, step: int, divisor: int, phase: str, course: float) -> dict[str, float]:
        """Carry out global step ``step``; returns its logs, which are the same on every worker.

        ``divisor``: size of the global batch.  ``phase``: `classifier` or `joint`.  ``course``: share of the phase
        that is done, in [0, 1].
        """
        drawn = self.population.draw(step) if self.population is not None and phase == "joint" else None
        losses = self.losses(batch, divisor=divisor, phase=phase, drawn=drawn)
        masker_gradients, classifier_gradients = self.gradients(losses)
        logs = list(losses.logs)
        numbers = torch.stack([losses.logs[name].double() for name in logs])
        collective.sum_in_place([numbers])
        collective.sum_in_place([*masker_gradients, *classifier_gradients])
        self._set_rates(phase, course)
        if classifier_gradients:
            self._apply(self.classifier_optimiser, self.classifier_parameters, classifier_gradients)
        if masker_gradients:
            norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in masker_gradients]))
            scale = (self.preset.optimisation.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            self._apply(self.masker_optimiser, self.masker_parameters, [g * scale for g in masker_gradients])
        if self.population is not None and phase == "joint":
            self.population.observe(step, self.model.backbone)
        return self._finish(dict(zip(logs, numbers.tolist(), strict=True)), phase)

    def losses(self, batch: Batch, *, divisor: int, phase: str, drawn: int | None) -> Losses:
        """All losses of this worker's share, with their graphs."""
        x, labels = batch
        backbone, masker = self.model.backbone, self.model.masker
        classifier_learns = self.trains_classifier and (phase == "classifier" or self.joint)
        backbone.train(classifier_learns and self.batchnorm_trains)
        masker.train()
        with torch.set_grad_enabled(classifier_learns), self.autocast:
            logits, features = backbone(x)
        logits = _wide(logits)
        clean = F.cross_entropy(logits, labels, reduction="none")  # (n,)
        right = logits.detach().argmax(1) == labels
        logs = {"clean_loss": clean.detach().sum() / divisor, "clean_right": right.to(clean).sum() / divisor}
        if phase == "classifier":
            return Losses(None, clean.sum() / divisor, logs)

        with self.autocast:
            native = masker.masks(_wide(masker({k: v.detach() for k, v in features.items()})))  # (n, 1, h, w)
        mask = upsample(native, (x.shape[2], x.shape[3]), masker.upsample)  # (n, 1, S, S)
        judge = backbone if drawn is None or self.population is None else self.population.network(drawn, backbone)
        with frozen_statistics(judge), self.autocast:
            logits_in = _wide(judge(mask_in(x, mask, self.fill)).logits)
            logits_out = _wide(judge(mask_out(x, mask, self.fill)).logits)
        unit = self._unit(judge, logits.shape[1])
        scale = unit if self.preset.relative_units else torch.ones_like(unit)

        sides = {
            "in": (self.preset.mask_in, self.preset.weight_in, logits_in),
            "out": (self.preset.mask_out, self.preset.weight_out, logits_out),
        }
        masker_loss = mask.new_zeros(())
        classifier_loss = clean.sum() / divisor
        for name, (config, weight, masked) in sides.items():
            if config is None:
                continue
            terms = side_loss(
                config,
                mask=mask,
                logits_masked=masked,
                logits_clean=logits.detach(),
                labels=labels,
                lambda_area=config.lambda_area * self.price,
                divisor=divisor,
            )
            masker_loss = masker_loss + weight * self._in_units(terms, scale, x.shape[2])
            if drawn is None:
                classifier_loss = classifier_loss + weight * F.cross_entropy(masked, labels, reduction="sum") / divisor
            logs[f"{name}_right"] = terms.masked_right.to(clean).sum() / divisor
        log_q = F.log_softmax(logits_out.detach(), 1)
        entropy = -(log_q.exp() * log_q).sum(1)  # (n,)
        logs |= {
            "mask_mean": native.detach().mean((1, 2, 3)).sum() / divisor,
            "masker_loss": masker_loss.detach(),
            "hidden": (right * entropy / unit).sum() / divisor,
            "unit": unit * len(x) / divisor,
        }
        return Losses(masker_loss, classifier_loss if classifier_learns else None, logs)

    def gradients(self, losses: Losses) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of the masker's and the classifier's parameters; nothing has moved yet."""
        masker: list[Tensor] = []
        classifier: list[Tensor] = []
        if losses.masker is not None:
            keep = losses.classifier is not None
            masker = list(torch.autograd.grad(losses.masker, self.masker_parameters, retain_graph=keep))
        if losses.classifier is not None:
            found = torch.autograd.grad(losses.classifier, self.classifier_parameters, allow_unused=True)
            classifier = [
                torch.zeros_like(p) if g is None else g for p, g in zip(self.classifier_parameters, found, strict=True)
            ]
        return masker, classifier

    # -- parts ------------------------------------------------------------------------------------------------------

    def _in_units(self, terms: SideTerms, scale: Tensor, size: int) -> Tensor:
        tv = terms.tv * (PUBLISHED_SIZE / size) if self.preset.relative_units else terms.tv
        return terms.objective / scale + terms.area + tv

    @torch.no_grad()
    def _unit(self, judge: nn.Module, classes: int) -> Tensor:
        """Entropy of the answer to a blank picture, in nats, at least a quarter of log C."""
        training = judge.training
        judge.eval()
        log_q = F.log_softmax(_wide(judge(self.blank).logits), 1)
        judge.train(training)
        return (-(log_q.exp() * log_q).sum()).clamp(min=SMALLEST_UNIT * math.log(classes))

    def _set_rates(self, phase: str, course: float) -> None:
        options = self.preset.optimisation
        if options.decay == "cosine":
            factor = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(course, 1.0)))
        else:
            factor = 0.1 ** min(int(3 * course), 2)
        warm = min(1.0, 0.1 + 20 * course)  # the first steps are gentle: BatchNorm and Adam know nothing yet
        self.classifier_optimiser.param_groups[0]["lr"] = self.rate * factor * warm * self._joint_factor(phase)
        self.masker_optimiser.param_groups[0]["lr"] = options.masker_rate * factor * warm

    def _joint_factor(self, phase: str) -> float:
        return self.preset.optimisation.joint_scratch_factor if phase == "joint" and self.scratch else 1.0

    @staticmethod
    def _apply(optimiser: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def _finish(self, logs: dict[str, float], phase: str) -> dict[str, float]:
        if phase == "joint":
            right = max(logs["clean_right"], 1e-6)
            logs["hidden"] /= right
            self.price = next_price(
                self.preset.price,
                self.price,
                entropy_share=logs["hidden"],
                sufficiency=logs.get("in_right", right) / right,
                mean_area=logs["mask_mean"],
            )
            logs["price"] = self.price
        return logs
