"""One backward pass where the masker and the classifier ask the same of an answer.

The classifier learns to minimise the cross-entropy of what it says of a masked picture.  A masker whose objective there is
classification minimises the same number (or its negative) in other units, so the two backward passes through the
classifier differ by a factor: one gives the gradient of the mask and those of the weights, and the other is saved.  Of
the eleven forward passes' worth of work of a joint step that is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.objectives import KLPriorConfig, SideConfig


def coinciding(config: SideConfig | KLPriorConfig, fake: Tensor | None) -> float | None:
    """The masker's objective in cross-entropies of the label: 1 or -1; none where it is another function of the answer.

    ``fake``: (n,) bool, pictures whose masker was told a wrong class (their objective is turned round); none without any.
    """
    if not isinstance(config, SideConfig) or config.objective != "classification" or fake is not None:
        return None
    return 1.0 if config.direction == "maximize" else -1.0


class SharedPass(NamedTuple):
    """One side of a step whose objective is the classifier's loss there but for ``factor``."""

    loss: Tensor
    """() What the classifier minimises on this side, a function of ``seen``."""
    seen: Tensor
    """(n, 1, S, S) The masks as the classifier got them: a leaf, so that the pass ends there."""
    mask: Tensor
    """(n, 1, S, S) The same masks with the masker's graph."""
    factor: Tensor | float
    """() The masker's objective is ``factor * loss``."""

    def split(self, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, list[Tensor | None]]:
        """Go back through the classifier once.

        Returns a number whose gradient through the masker's graph is that of the objective (its value means nothing),
        and the gradients of ``loss`` by ``parameters``, none for those that have no part in it.
        """
        through, *found = torch.autograd.grad(self.loss, [self.seen, *parameters], allow_unused=True)
        assert through is not None  # every fill shows the picture through the mask
        return (self.mask * (through * self.factor)).sum(), list(found)


def summed(parameters: Sequence[nn.Parameter], parts: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
    """The sum of ``parts``, each with a gradient for each of ``parameters`` or none."""
    result = []
    for parameter, gradients in zip(parameters, zip(*parts, strict=True), strict=True):
        found = [gradient for gradient in gradients if gradient is not None]
        result.append(sum(found[1:], found[0]) if found else torch.zeros_like(parameter))
    return result
