"""Where masks begin: a data-dependent start of the masker's last convolution.

With the published initialisation the logits of a new masker deviate by about 10 around a mean that the seed draws from as
wide a range: its masks are 0 or 1 almost everywhere, cover anything from next to nothing to nearly all of a picture, and
hardly pass a gradient.  60 epochs get over it; a run of a few hundred steps may not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline import collective
from pipeline.model import SaliencyModel


@torch.no_grad()
def even_out(
    model: SaliencyModel, images: Tensor, *, areas: Tensor | None = None, labels: Tensor | None = None
) -> None:
    """Let a masker that has not learnt yet begin with masks of half the picture.

    Scales its last convolution so that the logits of ``images`` (n, 3, h, w), over all workers, have mean 0 and deviation 1:
    layer-sequential unit variance (Mishkin & Matas, ICLR 2016), for the one layer where it matters; what comes before is
    normalised already.  ``areas`` (n,) and ``labels`` (n,) are for maskers that take them.  Running statistics stay as they
    are; the classifier is left in eval mode.
    """
    masker = model.masker
    maps = model.backbone.eval()(images).features
    kept = [buffer.clone() for buffer in masker.buffers()]
    masker.train()
    logits = masker(
        maps,
        target_area=areas if masker.target_area else None,
        labels=labels if masker.class_module is not None else None,
    ).double()
    for buffer, before in zip(masker.buffers(), kept, strict=True):
        buffer.copy_(before)
    sums = torch.stack([torch.full_like(logits[0, 0, 0, 0], logits.numel()), logits.sum(), logits.square().sum()])
    collective.sum_in_place([sums])
    count, total, squares = sums.tolist()
    mean = total / count
    deviation = max(squares / count - mean**2, 0.0) ** 0.5
    if deviation > 0:
        last = masker.last
        assert last.bias is not None
        last.weight.div_(deviation)
        last.bias.sub_(mean).div_(deviation)
