"""What joint training made of a classifier: how often both answer alike, and what lies between them.

The loss barrier is the most that the cross-entropy rises, on the straight line between the two networks' weights, above
the line between their losses (Frankle et al. 2020): near 0, both lie in one basin.

BatchNorm statistics that lie between those of the two ends belong to no network, and would raise a barrier of their own;
where the ends' differ, those of the networks between them are estimated on the images that are evaluated.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.backbone import Backbone
from pipeline.batchnorm_statistics import estimate_statistics

POINTS = 5
"""Places on the line at which the loss is measured, ends included."""


@torch.no_grad()
def compare_classifiers(
    before: Backbone, after: Backbone, images: Tensor, targets: Tensor, *, batch_size: int = 32
) -> dict[str, float]:
    """Top-1 of both, share of equal answers, and the loss barrier in nats.

    ``before``, ``after``: the same architecture.  ``images``: (n, 3, S, S) normalised; ``targets``: (n,) logit indices.
    """
    answers = [_answers(network, images, batch_size) for network in (before, after)]
    guesses = [logits.argmax(1) for logits in answers]
    losses = [float(F.cross_entropy(answers[0], targets))]
    for share in np.linspace(0, 1, POINTS)[1:-1]:
        between = interpolate(before, after, float(share))
        if _other_statistics(before, after) and len(images) > 1:  # a single image has none
            estimate_statistics(between, [between], images, batch_size=batch_size)
        losses.append(float(F.cross_entropy(_answers(between, images, batch_size), targets)))
    losses.append(float(F.cross_entropy(answers[1], targets)))
    return {
        "top1_before": float((guesses[0] == targets).float().mean()),
        "top1_after": float((guesses[1] == targets).float().mean()),
        "agreement": float((guesses[0] == guesses[1]).float().mean()),
        "loss_barrier": loss_barrier(losses),
    }


def loss_barrier(losses: Sequence[float]) -> float:
    """Largest height of ``losses``, at equal distances along a line, above the straight line between its ends; at least 0."""
    straight = np.linspace(losses[0], losses[-1], len(losses))
    return float(np.max(np.asarray(losses) - straight))


def interpolate(before: Backbone, after: Backbone, share: float) -> Backbone:
    """The network ``share`` of the way from ``before`` to ``after``, in eval mode; counters are those of ``after``."""
    result = copy.deepcopy(after).eval()
    ends = before.state_dict()
    mixed = {
        name: torch.lerp(ends[name], value, share) if value.is_floating_point() else value
        for name, value in after.state_dict().items()
    }
    result.load_state_dict(mixed)
    return result


def _other_statistics(before: Backbone, after: Backbone) -> bool:
    """Whether a BatchNorm layer has learnt other statistics in the one network than in the other."""
    theirs = dict(after.named_buffers())
    return any(
        not torch.equal(value, theirs[name])
        for name, value in before.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    )


def _answers(network: Backbone, images: Tensor, batch_size: int) -> Tensor:
    network.eval()
    return torch.cat([network(images[k : k + batch_size]).logits for k in range(0, len(images), batch_size)])
