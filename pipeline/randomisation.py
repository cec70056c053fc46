"""Sanity checks after Adebayo et al. 2018: an explanation of a classifier has to change when the classifier does.

Under a fixed masker, parts of the classifier get fresh weights: from the output down, all together (cascading), or each
part alone (independent).  A masker is itself trained, so there is a second question: how alike are the masks of maskers
that were *retrained*, each for its own randomised classifier?  And a third: those of a model that learnt random labels?
"""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.batchnorm_statistics import estimate_statistics
from pipeline.bundle import Bundle, load_bundle
from pipeline.data.splits import read_split
from pipeline.errors import UsageError
from pipeline.metrics.masks import upsample_nearest
from pipeline.metrics.similarity import similarities
from pipeline.model import SaliencyModel
from pipeline.reporting import FolderReporter
from pipeline.sanity_layers import randomisable_modules
from pipeline.training import TrainingPlan, train

MEASURES = ("spearman", "abs_spearman", "ssim", "hog_correl")
PREFIX = "extractor."
"""What a backbone's state dict puts before the classifier's own names."""
SMALLEST = 48
"""Side in pixels of the smallest mask that has a block of HOG cells."""
LAST_SHARE = 0.1
"""Share of a run's steps, its last ones, over which its training accuracy is taken."""


def fresh_weights(module: nn.Module) -> None:
    """Initialise ``module`` and all in it anew, buffers of BatchNorm included, by the rules of its layers."""
    for part in module.modules():
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if callable(reset):
            reset()
            continue
        for parameter in part.parameters(recurse=False):  # tokens and scales, whose modules have no rule of their own
            nn.init.normal_(parameter, std=0.02)


def randomised(model: SaliencyModel, modules: Sequence[str], x: Tensor, *, seed: int) -> SaliencyModel:
    """A copy of ``model`` whose classifier has fresh weights in ``modules``; a module's weights depend on seed and name.

    The statistics of BatchNorm layers in ``modules`` are those of the normalised images ``x`` (n, 3, S, S), two or more:
    with fresh ones, mean 0 and variance 1, the signal fades with every layer that the initialisation does not scale to
    1, deep maps are the same everywhere, and the check would measure that and not what the weights are worth.
    """
    twin = copy.deepcopy(model)
    for name in modules:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.default_rng([seed, *name.encode()]).integers(2**31)))
            fresh_weights(twin.backbone.extractor.get_submodule(name))
    twin.eval().requires_grad_(False)
    fresh = [twin.backbone.extractor.get_submodule(name) for name in modules]
    estimate_statistics(twin.backbone, fresh, x)
    return twin


def stages(model: SaliencyModel, *, depth: int) -> list[str]:
    """The classifier's modules from the output down."""
    return randomisable_modules(model.backbone.extractor, depth)[::-1]


@torch.no_grad()
def masks_of(model: SaliencyModel, x: Tensor, *, batch_size: int = 32) -> np.ndarray:
    """Masks (n, h, w) of normalised images (n, 3, S, S)."""
    parts = [model(x[k : k + batch_size])[1][:, 0] for k in range(0, len(x), batch_size)]
    return torch.cat(parts).float().numpy()


def compare(reference: np.ndarray, masks: np.ndarray, size: int) -> dict[str, float]:
    """Mean of each measure over the images, for masks (n, h, w) of inputs of ``size`` pixels.

    The measures' windows and cells are in pixels of the input, so masks are stretched over it first, as the published
    figures had them; HOG needs 48 pixels.
    """
    reference, masks = (upsample_nearest(m.astype(np.float64), max(size, SMALLEST)) for m in (reference, masks))
    rows = [similarities(one, two) for one, two in zip(reference, masks, strict=True)]
    means = {}
    for name in MEASURES:
        values = np.array([row[name] for row in rows])
        means[name] = float(np.nanmean(values)) if np.isfinite(values).any() else math.nan
    return means


def fixed_masker(
    bundle: Bundle, x: Tensor, *, depth: int, seed: int, cascading: bool
) -> Iterator[tuple[str, dict[str, float]]]:
    """(module, likeness of the masks to those of the whole model), from the output down."""
    reference = masks_of(bundle.model, x)
    names = stages(bundle.model, depth=depth)
    for place, name in enumerate(names):
        chosen = names[: place + 1] if cascading else [name]
        masks = masks_of(randomised(bundle.model, chosen, x, seed=seed), x)
        yield name, compare(reference, masks, bundle.spec.input_size)


def retrained_masker(
    bundle: Bundle,
    x: Tensor,
    data: str,
    *,
    depth: int,
    seed: int,
    cascading: bool,
    steps: int,
    points: int,
    folder: Path,
) -> Iterator[tuple[str, dict[str, float]]]:
    """As `fixed_masker`, but each of ``points`` randomised classifiers gets a masker of its own, trained for ``steps``.

    The first pair is the control: the whole classifier again, with another seed for the masker.  The randomised ones
    have that seed, too, so that what differs from the control is the classifier alone.
    """
    names = stages(bundle.model, depth=depth)
    places = sorted({round(k * len(names) / points) for k in range(1, points + 1)})
    reference = masks_of(_retrain(bundle, bundle.model, data, steps, seed, folder / "reference"), x)
    control = masks_of(_retrain(bundle, bundle.model, data, steps, seed + 1, folder / "control"), x)
    yield "(none)", compare(reference, control, bundle.spec.input_size)
    for place in places:
        chosen = names[:place] if cascading else names[place - 1 : place]
        twin = randomised(bundle.model, chosen, x, seed=seed)
        masks = masks_of(_retrain(bundle, twin, data, steps, seed + 1, folder / str(place)), x)
        yield names[place - 1], compare(reference, masks, bundle.spec.input_size)


def random_labels(
    bundle: Bundle, x: Tensor, data: str, *, seed: int, steps: int, folder: Path
) -> Iterator[tuple[str, dict[str, float]]]:
    """Models trained from the start for ``steps`` on the true labels with another seed, and on the labels in another order.

    Beside the likeness, each pair has the share of training images that the model and the reference had right at the
    end of their training: masks of models that have not learnt their labels say nothing.
    """
    plan = replace(_plan(bundle, data, steps, seed), weights=None, batchnorm="sync", preset=bundle.spec.preset)
    again = replace(plan, seed=seed + 1)
    shuffled = np.random.default_rng([seed, 0x1ABE1]).permutation(np.array(plan.labels)).tolist()
    reference = masks_of(_trained(plan, folder / "reference"), x)
    fitted = {"reference_training_accuracy": training_accuracy(folder / "reference")}
    for name, other in (("true labels", again), ("random labels", replace(again, labels=tuple(shuffled)))):
        place = folder / name.replace(" ", "-")
        likeness = compare(reference, masks_of(_trained(other, place), x), plan.input_size)
        yield name, likeness | fitted | {"training_accuracy": training_accuracy(place)}


def training_accuracy(folder: Path) -> float:
    """Share of the training images that a run's classifier had right in the last tenth of its steps."""
    with (folder / "state" / "log.csv").open(encoding="utf-8", newline="") as file:
        right = [float(row["clean_right"]) for row in csv.DictReader(file)]
    return float(np.mean(right[-math.ceil(LAST_SHARE * len(right)) :]))


def _plan(bundle: Bundle, data: str, steps: int, seed: int) -> TrainingPlan:
    """The plan that the bundle was trained by, for so many steps."""
    fields = bundle.spec.training.get("plan")
    if fields is None:
        raise UsageError(
            f"{bundle.path} was not made by pipeline.train, so it cannot be trained again; leave --retrain out"
        )
    split = read_split(data, "train", classes=bundle.spec.data_classes)
    fresh = {
        "data": split.root,
        "paths": tuple(split.paths),
        "labels": tuple(bundle.spec.class_index[label] for label in split.labels),
        "class_names": tuple(bundle.spec.class_names),
        "steps": steps,
        "budget": None,
        "seed": seed,
        "checkpoint_seconds": math.inf,
    }
    return TrainingPlan.of(fields | fresh)


def _retrain(bundle: Bundle, model: SaliencyModel, data: str, steps: int, seed: int, folder: Path) -> SaliencyModel:
    """``model``'s classifier, frozen, with a masker trained for it by the method of the bundle."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "classifier.safetensors"
    state = model.backbone.state_dict()
    save_file({name.removeprefix(PREFIX): value.contiguous() for name, value in state.items()}, weights)
    plan = _plan(bundle, data, steps, seed)
    settings = (*plan.settings, "classifier=frozen", "population=none")
    return _trained(replace(plan, weights=str(weights), settings=settings, batchnorm="eval"), folder)


def _trained(plan: TrainingPlan, folder: Path) -> SaliencyModel:
    state = folder / "state"
    train(plan, FolderReporter(state))
    return load_bundle(state / "bundle").model
