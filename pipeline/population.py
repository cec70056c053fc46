"""The classifier population: earlier states of the classifier, drawn to judge a mask (paper section 3.2).

A mask that only fools the classifier of this very step is no explanation; judged by classifiers of other steps it has
to be evidence for all of them.  Every decision depends on the seed and the step alone, so all workers agree on it
without a message and a resumed run draws what an undisturbed one would.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class PopulationConfig:
    """How a population grows and how often it is asked."""

    probability: float = 0.5
    """Share of steps whose masks are judged by an earlier classifier; in these the classifier is not trained on masked images."""
    save_every: int = 100
    """Steps between two snapshots."""
    size: int = 30
    """Snapshots kept; when full, a random one is replaced."""
    inert: bool = False
    """As published: a drawn snapshot is loaded and never asked, so that all that a draw does is to keep the classifier
    from its masked images for a step."""
    own_clean: bool = False
    """Whether a drawn snapshot's own answer to the whole image says if that was recognised, and not the current
    classifier's, as published: an earlier classifier that is wrong on the whole image rewards an empty mask."""

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"population probability {self.probability} is not between 0 and 1")
        if self.save_every < 1 or self.size < 1:
            raise ValueError(f"population of {self.size} saved every {self.save_every} steps: both must be at least 1")


class Population:
    """Snapshots of a classifier, and one network into which they are loaded."""

    def __init__(self, *, config: PopulationConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.snapshots: list[dict[str, Tensor]] = []
        self.taken: list[int] = []
        """The step of each snapshot."""
        self._network: nn.Module | None = None
        self._loaded: int | None = None

    def observe(self, step: int, classifier: nn.Module) -> None:
        """Take a snapshot of ``classifier`` when ``step`` calls for one (and at the first chance)."""
        if self.snapshots and step % self.config.save_every != self.config.save_every - 1:
            return
        state = {name: value.detach().cpu().clone() for name, value in classifier.state_dict().items()}
        if len(self.snapshots) < self.config.size:
            self.snapshots.append(state)
            self.taken.append(step)
        else:
            slot = int(self._random(step, 1).integers(self.config.size))
            self.snapshots[slot], self.taken[slot] = state, step
            if slot == self._loaded:
                self._loaded = None

    def draw(self, step: int) -> int | None:
        """The snapshot that judges the masks of ``step``; none when the current classifier does."""
        random = self._random(step, 0)
        if not self.snapshots or random.random() >= self.config.probability:
            return None
        return int(random.integers(len(self.snapshots)))

    def network(self, index: int, like: nn.Module) -> nn.Module:
        """Snapshot ``index`` as a network of the architecture of ``like``, in eval mode and without gradients."""
        if self._network is None:
            self._network = copy.deepcopy(like).requires_grad_(False).eval()
        if self._loaded != index:
            self._network.load_state_dict(self.snapshots[index])
            self._loaded = index
        return self._network

    def state(self) -> dict[int, dict[str, Tensor]]:
        """The snapshots by the steps at which they were taken, for a checkpoint; their order counts."""
        return dict(zip(self.taken, self.snapshots, strict=True))

    def restore(self, snapshots: Mapping[int, dict[str, Tensor]]) -> None:
        """Take the snapshots of a checkpoint."""
        self.taken, self.snapshots = list(snapshots), list(snapshots.values())
        self._loaded = None

    def _random(self, step: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, 0x90B, step, purpose])
