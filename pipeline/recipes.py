"""The paper's own runs: a preset and everything around it (network, data passes, geometry), as ``--recipe NAME``.

    ray job submit -- python -m pipeline.train --recipe paper-ca --data IMAGENET --out s3://bucket/ca --workers 8

Hardware: the paper used one GPU; the batch is a global one, so that any number of workers takes the same steps.  With
``--batch-size N`` the rates follow the batch: linearly for SGD (Goyal et al. 2017), by its square root for Adam (Malladi
et al. 2022).  ``--dry-run`` says how long it is and what it needs.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from pipeline.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Values of `pipeline.train`'s flags that are not given on the command line."""

    preset: str
    init: str = "resnet50"
    weights: str = "IMAGENET1K_V1"
    """The weights of 2016, which the paper started from."""
    epochs: float = 12.0
    """60 epochs of a fifth of the training set each."""
    image_size: int = 224
    geometry: str = "crop"
    """The short side to 224, then the centre: how the paper's figures were taken."""
    batchnorm: str
    expected: str
    """What the paper's run reached, for `--dry-run`."""

    def defaults(self) -> dict[str, Any]:
        """By the flags' names in `argparse`."""
        return {
            "preset": self.preset,
            "init": self.init,
            "weights": self.weights,
            "epochs": self.epochs,
            "image_size": self.image_size,
            "geometry": self.geometry,
            "batchnorm": self.batchnorm,
        }


RECIPES: dict[str, Recipe] = {
    "paper-ca": Recipe(
        preset="paper-ca",
        batchnorm="sync",
        expected="published: LE 35.8, OM 48.4, F1 62.0, SM 0.523, mean mask 0.446, top-1 75.2 (ImageNet validation)",
    ),
    "paper-fix": Recipe(
        preset="paper-fix",
        batchnorm="eval",
        expected="not known: no figure of the paper's FIX run was published with its code",
    ),
}


def scaled_rates(recipe: Recipe, batch_size: int) -> list[str]:
    """Settings (`pipeline.settings`) that fit the recipe's rates to another global batch; none for its own."""
    preset = PRESETS[recipe.preset]
    factor = batch_size / preset.batch_size
    if factor == 1:
        return []
    options = preset.optimisation
    sgd = factor if options.classifier_method == "sgd" else math.sqrt(factor)
    return [
        f"optimisation.masker_rate={options.masker_rate * math.sqrt(factor):.6g}",
        f"optimisation.classifier_rate={options.classifier_rate * sgd:.6g}",
    ]


def apply_recipe(arguments: argparse.Namespace) -> None:
    """Put the rates for ``--batch-size`` before the command line's own ``--set``."""
    if arguments.recipe and (arguments.batch_size or 0) > 0:
        arguments.set = [*scaled_rates(RECIPES[arguments.recipe], arguments.batch_size), *arguments.set]
