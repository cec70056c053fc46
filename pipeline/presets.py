"""Named methods: each a row of the same table (mask source, fill, masked-in term, masked-out term, size term, who trains).

How the presets transfer
------------------------
The published weights (size 10 or 15, TV 0.001) were tuned for 1000 classes at 224 pixels, where the entropy that they
are weighed against reaches log 1000.  With 10 classes the same numbers shrink every mask to nothing.  Three rules take
their place, so that one preset holds from 10 classes to 1000, from 64 to 224 pixels, and for weak and strong classifiers:

1. *Units.*  Both objectives are divided by the uncertainty of a blank picture: the entropy of the classifier's answer
   to the bare fill, at least a quarter of log C.  A mask that hides all evidence scores 1 whatever the number of classes,
   and whatever the classifier has learnt to say of nothing.
2. *Price.*  The weight of the area is a dual variable (`pipeline.area_price`): it rises while the masked-out pictures
   keep more than a stated share of that uncertainty and the masked-in ones are recognised, and falls otherwise.  The masks become
   the smallest that still hide the evidence and still show enough of it; their size is found from the data instead of being set.
3. *Length.*  TV sums over pixels, so a contour of the same shape costs twice as much at twice the resolution; its
   weight is scaled by 224 / input size.

A classifier that starts from random weights is first trained by itself (`pretraining`), since the size term and the
entropy term count only images that it gets right.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.area_price import AreaPriceConfig
from pipeline.data.batches import Augmentation
from pipeline.objectives import SideConfig
from pipeline.population import PopulationConfig


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """Learning rates and their course."""

    masker_rate: float = 5e-3
    """Adam's learning rate for the masker."""
    classifier_method: Literal["adam", "sgd"] = "adam"
    """The classifier's optimiser.  The paper's is SGD; Adam's steps do not depend on how a network
    spreads its scale over its layers, which differs widely between sources (folded BatchNorm, say)."""
    classifier_rate: float = 1e-4
    """Its learning rate where the classifier brings its weights."""
    scratch_rate: float = 1e-3
    """Its learning rate where the classifier starts from random weights."""
    joint_scratch_factor: float = 0.3
    """Factor of `scratch_rate` once the masker is trained along."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    """Of both optimisers, added to the gradient (not decoupled)."""
    clip_norm: float = 10.0
    """Largest global norm of the masker's gradient."""
    decay: Literal["cosine", "steps"] = "cosine"
    """`cosine` to 2 % over the phase; `steps`: a tenth after each third, as published."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One method."""

    name: str
    summary: str
    """One line for `--help`."""
    classifier: Literal["frozen", "joint"]
    """Whether the classifier learns along with the masker."""
    mask_in: SideConfig | None
    mask_out: SideConfig | None
    weight_in: float = 1.0
    weight_out: float = 1.0
    relative_units: bool = True
    """Divide the objectives by the uncertainty of a blank picture (rule 1) and scale TV with resolution (rule 3)."""
    price: AreaPriceConfig = field(default_factory=AreaPriceConfig)
    """Multiplies the `lambda_area` of both sides (rule 2)."""
    fill: str = "zero"
    """Name of the fill (`pipeline.fills.FILLS`)."""
    population: PopulationConfig | None = None
    """None: masks are always judged by the current classifier."""
    pretraining: float = 0.4
    """Share of the run that trains a classifier by itself when it starts from random weights."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """How training pictures are cropped and mirrored."""
    optimisation: Optimisation = field(default_factory=Optimisation)
    batch_size: int = 32
    """Images per step over all workers."""


# Size weights in the proportion of the paper's: masked-in 1, masked-out 10 (FIX) or 15 (CA).
_IN = SideConfig(side="in", objective="classification", lambda_area=0.1, lambda_tv=0.0002)
_OUT = SideConfig(side="out", objective="entropy", lambda_area=1.0, lambda_tv=0.0002)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="ca",
            summary="classifier-agnostic: the classifier learns along and earlier states of it judge the masks (paper row J)",
            classifier="joint",
            mask_in=_IN,
            mask_out=_OUT,
            population=PopulationConfig(probability=0.5, save_every=50, size=10),
            # A classifier that learns along reads more out of what a mask leaves, so that less can be asked of the mask.
            price=AreaPriceConfig(target=0.5),
        ),
        Preset(
            name="fix",
            summary="explains a given classifier, whose weights stay as they are (paper row I)",
            classifier="frozen",
            mask_in=_IN,
            mask_out=_OUT,
            pretraining=0.5,
            # Pictures with grey holes are strange to a frozen classifier, so that fewer of them can be recognised.
            price=AreaPriceConfig(sufficiency=0.7),
            # A frozen classifier cannot learn pictures by heart, so the masker sees objects at the size that they have.
            augmentation=Augmentation(smallest_area=1.0, aspect=1.0),
        ),
    )
}
