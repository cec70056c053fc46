"""One training step: clean, masked-in and masked-out pictures, two networks, gradients first and updates last.

``plain=True`` is the oracle of the faster form.  Both differ from the published step in three places, all on purpose: every
gradient is taken before any weight moves (the reference moves the classifier under the masker's backward pass), a drawn
earlier classifier really judges the masks and the whole pictures that they are compared with (the reference loads it and
asks the current one), and the classifier's BatchNorm statistics are those of clean pictures.  ``Preset.compat =
"published"`` moves the classifier on its clean loss before it judges the masks, and lets masked pictures shift its
statistics; ``PopulationConfig.inert`` never asks a drawn one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import collective
from pipeline.acceleration import accelerate
from pipeline.area_price import Price, next_price
from pipeline.batchnorm import frozen_statistics
from pipeline.blank import blank_answer, blank_loss, unit_of, wide
from pipeline.clean_cache import CleanCache
from pipeline.concrete import ConcreteHead
from pipeline.fakes import told_classes
from pipeline.fills import Fill, Zero
from pipeline.first_masks import even_out
from pipeline.masking import mask_in, mask_out, upsample
from pipeline.model import SaliencyModel
from pipeline.objectives import KLPriorConfig, SideConfig, kl_prior_criterion, side_loss
from pipeline.population import Population
from pipeline.presets import Preset
from pipeline.shared_pass import SharedPass, coinciding, summed

PUBLISHED_SIZE = 224
"""Input size for which the weights of TV are stated."""


class Batch(NamedTuple):
    """A worker's share of a global batch."""

    images: Tensor
    """(n, 3, S, S) normalised."""
    labels: Tensor
    """(n,) int64 logit indices."""
    areas: Tensor | None = None
    """(n,) wanted mask areas in [0, 1], for maskers that take them."""
    views: tuple[int, ...] | None = None
    """A number for each picture that tells it from every other one, mirrored ones included; none where there are too many."""


class Clean(NamedTuple):
    """What the classifier says of the pictures as they are."""

    logits: Tensor
    """(n, C)."""
    features: dict[int, Tensor]
    """Layer -> (n, c, h, w)."""
    loss: Tensor
    """Sum of the cross-entropies over the global batch size."""
    logs: dict[str, Tensor]


@dataclass
class Losses:
    """What one step computes before anything moves; sums over this worker's images divided by the global batch size."""

    masker: Tensor | None
    """What the masker minimises; none while the classifier is trained by itself.  Its gradients: `JointStep.gradients`."""
    classifier: Tensor | None
    """What the classifier minimises; none when it is frozen."""
    logs: dict[str, Tensor]
    """Scalars that add up over the workers."""
    shared: tuple[SharedPass, ...] = ()
    """Sides whose gradients, of both networks, come out of one pass: in the two above as numbers only."""


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
        classes: Sequence[int] | None = None,
        class_weights: Tensor | None = None,
        cache: CleanCache | None = None,
        plain: bool = False,
    ) -> None:
        """``blank``: (1, 3, S, S), the picture with everything masked.  ``scratch``: the classifier starts from random weights.
        ``classes``: the outputs that the data has pictures of; none: all.  ``class_weights``: (C,), see `class_weights_of`;
        needed for a prior of the data.  ``cache``: of a frozen classifier's clean passes.

        ``plain``: leave the classifier's layers as they are, instead of rewriting them (`pipeline.acceleration`), take each
        network's gradients in passes of their own (`pipeline.shared_pass`), and move the weights one by one.
        """
        self.model = model
        self.plain = plain
        if not plain:
            accelerate(model.backbone)
        self.preset = preset
        self.blank = blank
        self.cache = cache
        self.class_weights = None if class_weights is None else class_weights.to(blank.device)
        self.fills = {side: fill if preset.fill_sides in ("both", side) else Zero() for side in ("in", "out")}
        self.classes = None if classes is None else torch.tensor(sorted(set(classes)), device=blank.device)
        self.population = population
        self.autocast = autocast or nullcontext()
        self.price = Price(preset.price.initial, preset.price.initial)
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
                parameters, lr=self.rate, momentum=options.momentum, weight_decay=options.weight_decay, fused=not plain
            )
        else:
            self.classifier_optimiser = torch.optim.Adam(
                parameters, lr=self.rate, weight_decay=options.weight_decay, fused=not plain
            )
        self.masker_optimiser = torch.optim.Adam(
            self.masker_parameters, lr=options.masker_rate, weight_decay=options.weight_decay, fused=not plain
        )

    # -- one step ---------------------------------------------------------------------------------------------------

    def __call__(
        self,
        batch: Batch,
        *,
        step: int,
        divisor: int,
        phase: str,
        course: float,
        generator: torch.Generator | None = None,
    ) -> dict[str, float]:
        """Carry out global step ``step``; returns its logs, which are the same on every worker.

        ``divisor``: size of the global batch.  ``phase``: `classifier` or `joint`.  ``course``: share of the phase
        that is done, in [0, 1].  ``generator``: of sampled masks and random fills.
        """
        drawn = self.population.draw(step) if self.population is not None and phase == "joint" else None
        self._set_rates(phase, course)
        if isinstance(self.model.masker.final, ConcreteHead):
            self.model.masker.final.course = course
        if phase == "joint" and self.preset.first_masks == "even" and not self.masker_optimiser.state:
            with self.autocast:
                even_out(self.model, batch.images, areas=batch.areas, labels=batch.labels)
        if self.preset.compat == "published" and self.joint and phase == "joint":
            clean = self.clean(batch, divisor=divisor, phase=phase)
            gradients = self.gradients(Losses(None, clean.loss, {}))[1]
            collective.sum_in_place(gradients)
            self._apply(self.classifier_optimiser, self.classifier_parameters, gradients)
            clean = clean._replace(loss=clean.loss.detach(), logits=clean.logits.detach())
            losses = self.masked(batch, clean, divisor=divisor, drawn=drawn, generator=generator)
        else:
            losses = self.losses(batch, divisor=divisor, phase=phase, drawn=drawn, generator=generator)
        masker_gradients, classifier_gradients = self.gradients(losses)
        logs = list(losses.logs)
        numbers = torch.stack([losses.logs[name].double() for name in logs])
        collective.sum_in_place([numbers])
        collective.sum_in_place([*masker_gradients, *classifier_gradients])
        if classifier_gradients:
            self._apply(self.classifier_optimiser, self.classifier_parameters, classifier_gradients)
        if masker_gradients:
            norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in masker_gradients]))
            scale = (self.preset.optimisation.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            self._apply(self.masker_optimiser, self.masker_parameters, [g * scale for g in masker_gradients])
        if self.population is not None and phase == "joint":
            self.population.observe(step, self.model.backbone)
        unsettled = self.scratch and self.joint and not self.model.masker.target_area
        settling = unsettled and course < self.preset.price.settling
        return self._finish(dict(zip(logs, numbers.tolist(), strict=True)), phase, settling)

    def losses(
        self,
        batch: Batch,
        *,
        divisor: int,
        phase: str,
        drawn: int | None,
        generator: torch.Generator | None = None,
    ) -> Losses:
        """All losses of this worker's share, with their graphs."""
        clean = self.clean(batch, divisor=divisor, phase=phase)
        if phase == "classifier":
            return Losses(None, clean.loss, clean.logs)
        return self.masked(batch, clean, divisor=divisor, drawn=drawn, generator=generator)

    def clean(self, batch: Batch, *, divisor: int, phase: str) -> Clean:
        """The classifier on the pictures as they are; with a graph where the classifier learns in ``phase``."""
        classifier_learns = self.trains_classifier and (phase == "classifier" or self.joint)
        self.model.backbone.train(classifier_learns and self.batchnorm_trains)
        known = None
        views = batch.views if self.cache is not None and not classifier_learns else None
        if self.cache is not None and views is not None:
            known = self.cache.find(views)
        if known is None:
            with torch.set_grad_enabled(classifier_learns), self.autocast:
                logits, features = self.model.backbone(batch.images)
            if self.cache is not None and views is not None:
                self.cache.keep(views, logits, features)
        else:
            logits, features = known
        logits = wide(logits)
        loss = F.cross_entropy(logits, batch.labels, reduction="sum") / divisor
        right = logits.detach().argmax(1) == batch.labels
        logs = {"clean_loss": loss.detach(), "clean_right": right.to(loss).sum() / divisor}
        if classifier_learns and self.joint and self.preset.weight_blank:
            share = len(batch.images) / divisor
            loss = loss + self.preset.weight_blank * share * blank_loss(self.model.backbone, self.blank, self.classes)
        return Clean(logits, features, loss, logs)

    def masked(
        self,
        batch: Batch,
        clean: Clean,
        *,
        divisor: int,
        drawn: int | None,
        generator: torch.Generator | None = None,
    ) -> Losses:
        """The losses of the masks of ``batch``, judged by the current classifier or the ``drawn`` earlier one."""
        x, labels, areas = batch.images, batch.labels, batch.areas
        backbone, masker, preset = self.model.backbone, self.model.masker, self.preset
        classifier_learns = self.trains_classifier and self.joint
        masker.train()
        with self.autocast:
            maps = {layer: value.detach() for layer, value in clean.features.items()}
            told, fake = told_classes(labels, clean.logits.shape[1], self.classes, preset.fakes, generator)
            classes = told if masker.class_module is not None else None
            mask_logits = wide(masker(maps, target_area=areas if masker.target_area else None, labels=classes))
            native = masker.masks(mask_logits, generator)  # (n, 1, h, w)
        mask = upsample(native, (x.shape[2], x.shape[3]), masker.upsample)  # (n, 1, S, S)
        asked = None if drawn is None or self.population is None or self.population.config.inert else drawn
        judge = backbone if asked is None or self.population is None else self.population.network(asked, backbone)
        with torch.no_grad():
            nothing = blank_answer(judge, self.blank)  # (C,)
        unit = unit_of(nothing)
        whole = clean.logits.detach()
        if asked is not None and self.population is not None and self.population.config.own_clean:
            with torch.no_grad(), frozen_statistics(judge), self.autocast:
                whole = wide(judge(x).logits)
        right = whole.argmax(1) == labels
        logs = clean.logs | {
            "judge_right": right.to(unit).sum() / divisor,
            "mask_mean": native.detach().mean((1, 2, 3)).sum() / divisor,
            "unit": unit * len(x) / divisor,
        }
        masker_loss = mask.new_zeros(())
        classifier_loss = clean.loss
        shared: list[SharedPass] = []
        shown = {
            "in": (preset.mask_in, preset.weight_in, mask_in),
            "out": (preset.mask_out, preset.weight_out, mask_out),
        }
        for name, (config, weight, show) in shown.items():
            if config is None:
                continue
            statistics = nullcontext() if preset.compat == "published" else frozen_statistics(judge)
            sign = None if self.plain or drawn is not None or not classifier_learns else coinciding(config, fake)
            seen = mask if sign is None else mask.detach().requires_grad_()
            with statistics, self.autocast:
                answer = wide(judge(show(x, seen, self.fills[name], generator)).logits)
            judged = answer if sign is None else answer.detach()
            masker_loss = masker_loss + weight * self._side(config, mask, judged, whole, batch, fake, unit, divisor)
            if drawn is None:
                learnt = weight * F.cross_entropy(answer, labels, reduction="sum") / divisor
                if sign is None:
                    classifier_loss = classifier_loss + learnt
                else:
                    shared.append(SharedPass(learnt, seen, mask, sign / unit if preset.relative_units else sign))
            logs[f"{name}_right"] = (answer.detach().argmax(1) == labels).to(unit).sum() / divisor
            if name == "out":
                log_q = F.log_softmax(answer.detach(), 1)
                entropy = -(log_q.exp() * log_q).sum(1)  # (n,)
                logs["hidden"] = (right * entropy / unit).sum() / divisor
                given_away = right & (answer.detach().argmax(1) == labels) & (labels != nothing.argmax())
                logs["leak"] = given_away.to(unit).sum() / divisor
        logs["masker_loss"] = masker_loss.detach()
        # In the published order a step without masked pictures leaves the classifier nothing more to learn.
        learns = classifier_learns and (classifier_loss.requires_grad or bool(shared))
        return Losses(masker_loss, classifier_loss if learns else None, logs, tuple(shared))

    def gradients(self, losses: Losses) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of the masker's and the classifier's parameters; nothing has moved yet."""
        split = [side.split(self.classifier_parameters) for side in losses.shared]
        parts: list[Sequence[Tensor | None]] = [found for _, found in split]
        masker: list[Tensor] = []
        if losses.masker is not None:
            keep = losses.classifier is not None
            asked = sum((term for term, _ in split), losses.masker)
            masker = list(torch.autograd.grad(asked, self.masker_parameters, retain_graph=keep))
        if losses.classifier is None:
            return masker, []
        if losses.classifier.requires_grad:
            parts.append(torch.autograd.grad(losses.classifier, self.classifier_parameters, allow_unused=True))
        return masker, summed(self.classifier_parameters, parts)

    # -- parts ------------------------------------------------------------------------------------------------------

    def _side(
        self,
        config: SideConfig | KLPriorConfig,
        mask: Tensor,
        answer: Tensor,
        clean_logits: Tensor,
        batch: Batch,
        fake: Tensor | None,
        unit: Tensor,
        divisor: int,
    ) -> Tensor:
        """Objective, area and TV of one side, in the preset's units; ``fake``: (n,) bool, see `told_classes`."""
        relative = self.preset.relative_units
        scale = unit if relative else torch.ones_like(unit)
        if isinstance(config, KLPriorConfig):
            prior = kl_prior_criterion(
                replace(config, lambda_area=config.lambda_area * self.price.charged),
                mask=mask,
                logits_masked=answer,
                logits_clean=clean_logits,
                labels=batch.labels,
                class_weights=self._prior_weights(config, answer),
                divisor=divisor,
            )
            return prior.objective / scale + prior.area
        terms = side_loss(
            config,
            mask=mask,
            logits_masked=answer,
            logits_clean=clean_logits,
            labels=batch.labels,
            target_area=batch.areas,
            lambda_area=config.lambda_area * self.price.charged,
            flipped=fake,
            divisor=divisor,
        )
        tv = terms.tv * (PUBLISHED_SIZE / mask.shape[-1]) if relative else terms.tv
        return terms.objective / scale + terms.area + tv

    def _prior_weights(self, config: KLPriorConfig, answer: Tensor) -> Tensor:
        weights = None if config.frequencies == "uniform" else self.class_weights
        return torch.ones_like(answer[0]) if weights is None else weights.to(answer)

    def _set_rates(self, phase: str, course: float) -> None:
        options = self.preset.optimisation
        if options.decay == "cosine":
            factor = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(course, 1.0)))
        else:
            factor = 0.1 ** min(int(3 * course), 2)
        warm = min(1.0, 0.1 + 20 * course)  # the first steps are gentle: BatchNorm and Adam know nothing yet
        along = options.joint_scratch_factor if phase == "joint" and self.scratch else 1.0
        self.classifier_optimiser.param_groups[0]["lr"] = self.rate * factor * warm * along
        self.masker_optimiser.param_groups[0]["lr"] = options.masker_rate * factor * warm

    @staticmethod
    def _apply(optimiser: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            # A fused optimiser goes through both memories side by side, whatever their formats are.
            alike = gradient.stride() == parameter.stride()
            parameter.grad = gradient if alike else torch.empty_like(parameter).copy_(gradient)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def _finish(self, logs: dict[str, float], phase: str, settling: bool) -> dict[str, float]:
        if phase == "joint":
            right = max(logs.pop("judge_right"), 1e-6)
            for name in ("hidden", "leak"):
                if name in logs:
                    logs[name] /= right
            self.price = next_price(
                self.preset.price,
                self.price,
                entropy_share=logs.get("hidden"),
                leak=logs.get("leak"),
                sufficiency=logs["in_right"] / right if "in_right" in logs else None,
                mean_area=logs["mask_mean"],
                settling=settling,
            )
            logs["price"] = self.price.charged
        return logs
