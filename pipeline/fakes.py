"""Wrong classes that a masker is told at times, so that it learns to keep quiet about what is not there.

Dabkowski & Gal 2017, section 4: their masker takes the class as an input, and some of the classes it is given are fakes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def told_classes(
    labels: Tensor, outputs: int, classes: Tensor | None, share: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor | None]:
    """The classes that the masker is to explain, (n,), and which of them are fakes, (n,) bool; none without fakes.

    ``labels``: (n,) int64, below ``outputs``.  ``classes``: sorted, those that may be told; none: all.  ``share``: of the
    pictures that are told another class than theirs, in [0, 1].
    """
    if not share:
        return labels, None
    classes = torch.arange(outputs, device=labels.device) if classes is None else classes
    if len(classes) < 2:
        return labels, None
    fake = torch.rand(len(labels), generator=generator, device=labels.device) < share
    steps = torch.randint(1, len(classes), (len(labels),), generator=generator, device=labels.device)
    others = classes[(torch.searchsorted(classes, labels) + steps) % len(classes)]
    return torch.where(fake, others, labels), fake
