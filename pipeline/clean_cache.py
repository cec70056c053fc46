"""What a frozen classifier said of pictures that come again and again: its answers and maps are computed once.

Worth it for small training sets (`--per-class 10`) whose pictures are shown whole, as they are and mirrored: a picture has
two views then, and the clean pass, one of three, is spared once all views of a batch have been seen: of batches of 16 it
is in 60 % after five rounds, and in nearly all after ten.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST_BYTES = 2 << 30
"""A set whose answers and maps take more than this is not kept."""


class CleanCache:
    """Answers and maps by view; every view of a batch is known, or the whole batch is computed again.

    Computing a part of a batch would change the last digits of its answers, so that a resumed run, whose cache is empty,
    would differ from an undisturbed one.
    """

    def __init__(self, views: int) -> None:
        """``views``: number of different pictures that can be asked for."""
        self.views = views
        self.open = True
        self._format = torch.contiguous_format
        self._kept: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}

    def find(self, keys: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]] | None:
        """Logits (n, C) and maps, layer -> (n, c, h, w), of the views ``keys``; none unless all of them are known."""
        found = [self._kept.get(key) for key in keys]
        known = [value for value in found if value is not None]
        if len(known) < len(found):
            return None
        layers = known[0][1]
        logits = torch.stack([one for one, _ in known])
        maps = {layer: torch.stack([features[layer] for _, features in known]) for layer in layers}
        return logits, {layer: value.contiguous(memory_format=self._format) for layer, value in maps.items()}

    def keep(self, keys: Sequence[int], logits: Tensor, features: dict[int, Tensor]) -> None:
        """Remember what was computed, unless all views would take more than `MOST_BYTES`."""
        one = logits[0].nbytes + sum(value[0].nbytes for value in features.values())
        if self.open and one * self.views > MOST_BYTES:
            self.open = False
            print(
                f"the classifier's answers to {self.views} views take {one * self.views / 2**30:.1f} GiB, more than "
                f"{MOST_BYTES >> 30}, and are computed anew at every step",
                flush=True,
            )
        if self.open:
            # The order in memory decides in which order sums are taken, and so the last digits.
            last = all(value.is_contiguous(memory_format=torch.channels_last) for value in features.values())
            self._format = torch.channels_last if last else torch.contiguous_format
            for row, key in enumerate(keys):
                if key not in self._kept:
                    maps = {layer: value[row].detach().clone() for layer, value in features.items()}
                    self._kept[key] = (logits[row].detach().clone(), maps)
