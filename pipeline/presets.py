"""Named methods: each a row of the same table (mask source, fill, masked-in term, masked-out term, size term, who trains).

How the presets transfer
------------------------
The published weights (size 10 or 15, TV 0.001) were tuned for 1000 classes at 224 pixels, where the entropy that they
are weighed against reaches log 1000.  With 10 classes the same numbers shrink every mask to nothing.  Five rules take
their place, so that one preset holds from 10 classes to 1000, from 64 to 224 pixels, and for weak and strong classifiers:

1. *Units.*  Both objectives are divided by the uncertainty of a blank picture: the entropy of the classifier's answer
   to the bare fill, at least a quarter of log C.  A mask that hides all evidence scores 1 whatever the number of classes,
   and whatever the classifier has learnt to say of nothing.
2. *Price.*  The weight of the area is a dual variable (`pipeline.area_price`): it rises while the masked-out pictures
   keep more than a stated share of that uncertainty and are not recognised, and the masked-in ones are recognised, and
   falls otherwise, but not below a floor (2 for a frozen classifier: the published weight in the units of rule 1).  The
   masks become the smallest that still hide the evidence and still show enough of it; their size is found from the data
   instead of being set.  The floor gives way while too few of the recognised pictures are still recognised masked-in, or
   too many masked-out, as happens with a weak classifier, which hiding makes hardly less sure.  A classifier that learns
   along from random weights first sees masks of half the picture, until what it says of masked pictures tells something.
3. *Length.*  TV sums over pixels, so a contour of the same shape costs twice as much at twice the resolution; its
   weight is scaled by 224 / input size.
4. *Nothing.*  A classifier that learns along has to answer masked pictures, and among few classes it soon takes one of
   them for the answer to emptiness; the masks of that class then vanish, since nothing is enough to recognise it.  Such
   a classifier therefore also learns that a blank picture may be any class of the data.
5. *Start.*  The published initialisation gives masks of 0 and 1 whose area the seed draws from 5 to 95 %; a run of a few
   hundred steps may spend them all on getting over it.  Masks start soft and at half the picture (`pipeline.first_masks`).

A classifier that starts from random weights is first trained by itself (`pretraining`), since the size term and the
entropy term count only images that it gets right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.area_price import AreaPriceConfig
from pipeline.data.batches import Augmentation
from pipeline.objectives import KLPriorConfig, SideConfig
from pipeline.population import PopulationConfig
from pipeline.spec import MaskerSpec


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """Learning rates and their course."""

    masker_rate: float = 5e-3
    """Adam's learning rate for the masker."""
    classifier_method: Literal["adam", "sgd"] = "adam"
    """The classifier's optimiser.  The paper's is SGD; Adam's steps do not depend on how a network
    spreads its scale over its layers, which differs widely between sources (folded BatchNorm, say)."""
    classifier_rate: float = 5e-6
    """Its learning rate where the classifier brings its weights: low, for one that learns fast reads the class out of
    what every mask leaves."""
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
    mask_in: SideConfig | KLPriorConfig | None
    mask_out: SideConfig | KLPriorConfig | None
    weight_in: float = 1.0
    weight_out: float = 1.0
    weight_blank: float = 0.0
    """Weight of the blank picture in what a classifier that learns along minimises (rule 4)."""
    relative_units: bool = True
    """Divide the objectives by the uncertainty of a blank picture (rule 1) and scale TV with resolution (rule 3)."""
    price: AreaPriceConfig = field(default_factory=AreaPriceConfig)
    """Multiplies the `lambda_area` of both sides (rule 2)."""
    fill: str = "zero"
    """Name of the fill (`pipeline.fills.FILLS`)."""
    fill_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the fill, such as the file of the user's own."""
    fill_sides: Literal["both", "in", "out"] = "both"
    """Which pictures get the fill; the hidden pixels of the others are zero, the mean colour."""
    masker: MaskerSpec = field(default_factory=MaskerSpec)
    """The masker: its inputs beside the maps, and how its logits become masks."""
    layers: tuple[int, ...] | Literal["deep", "all"] = "deep"
    """Layers that the masker reads, 0 the finest: `deep` is the maps of 4 to 16 cells, at most three."""
    first_masks: Literal["even", "published"] = "published"
    """`even`: the masker starts with soft masks of half the picture (`pipeline.first_masks`); `published`: with what its
    initial weights happen to give, mostly 0 or 1."""
    area_range: tuple[float, float] = (0.25, 0.75)
    """Wanted areas are drawn from this range, one for each picture, where the masker takes one."""
    fakes: float = 0.0
    """Share of the pictures whose masker is told a class of the data that they are not of; the right mask is then empty.
    For maskers that take a class, judged by hinges, at a fixed price."""
    compat: Literal["published"] | None = None
    """`published` repeats the order of updates and the BatchNorm statistics of the reference's step (`pipeline.step`)."""
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
_IN = SideConfig(side="in", objective="classification", lambda_area=0.1, lambda_tv=0.001)
_OUT = SideConfig(side="out", objective="entropy", lambda_area=1.0, lambda_tv=0.001)
_FIXED = AreaPriceConfig(rule="fixed", initial=1.0)

SIDES: dict[str, dict[str, SideConfig | KLPriorConfig | None]] = {
    "mask_in": {
        "none": None,
        "classification": _IN,
        "entropy": SideConfig(side="in", objective="entropy", direction="minimize", lambda_area=0.1, lambda_tv=0.001),
        "hinge": SideConfig(side="in", objective="hinge", lambda_area=0.1, lambda_tv=0.001),
        "kl-prior": KLPriorConfig(lambda_area=0.1),
    },
    "mask_out": {
        "none": None,
        "classification": SideConfig(
            side="out", objective="classification", direction="minimize", lambda_area=1.0, lambda_tv=0.001
        ),
        "entropy": _OUT,
        "hinge": SideConfig(side="out", objective="hinge", direction="minimize", lambda_area=1.0, lambda_tv=0.001),
        "kl-prior": KLPriorConfig(lambda_area=1.0),
    },
}
"""Names of what can be asked of each side, in the direction that suits it."""


def _casm(name: str, weight: float, population: PopulationConfig | None, pool: str) -> Preset:
    """CASM (Zolna, Geras & Cho 2020): masked-out only, all layers; its size weights in units of log 1000."""
    side = SideConfig(side="out", objective="entropy", lambda_area=weight / _LOG_1000, lambda_tv=0.0)
    return Preset(
        name=name,
        summary=f"the predecessor: masked-out only, all layers, judged by {pool}",
        classifier="joint",
        mask_in=None,
        mask_out=side,
        price=_FIXED,
        population=population,
        layers="all",
    )


def _paper(name: str, *, joint: bool) -> Preset:
    """The published constants (paper section 3.3), which fit ResNet-50, 224 pixels and 1000 classes."""
    return Preset(
        name=name,
        summary=f"every constant of the paper's own {'CA' if joint else 'FIX'} run: 1000 classes, ResNet-50, 12 passes",
        classifier="joint" if joint else "frozen",
        mask_in=SideConfig(side="in", objective="classification", lambda_area=1.0, lambda_tv=0.001),
        mask_out=SideConfig(side="out", objective="entropy", lambda_area=15.0 if joint else 10.0, lambda_tv=0.001),
        relative_units=False,
        price=_FIXED,
        population=PopulationConfig(probability=0.5, save_every=100, size=30) if joint else None,
        layers=(3, 4),
        pretraining=0.0,
        augmentation=Augmentation(smallest_area=0.08, aspect=4 / 3, absolute=True),
        optimisation=Optimisation(
            masker_rate=1e-3, classifier_method="sgd", classifier_rate=1e-3, scratch_rate=1e-3, decay="steps"
        ),
        batch_size=72,
    )


_LOG_1000 = math.log(1000)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="ca",
            summary="classifier-agnostic: the classifier learns along and earlier states of it judge the masks (paper row J)",
            classifier="joint",
            mask_in=_IN,
            mask_out=_OUT,
            weight_blank=1.0,
            first_masks="even",
            population=PopulationConfig(probability=0.5, save_every=50, size=10, own_clean=True),
            pretraining=0.3,
            # A classifier that learns along reads more out of what a mask leaves, so that less can be asked of the mask.
            # Its answers come to range over the classes of the data alone: the unit of rule 1 shrinks, and the floor rises.
            price=AreaPriceConfig(target=0.7, largest_leak=0.6, initial=2.5, lowest=2.5, smallest_sufficiency=0.65),
        ),
        Preset(
            name="fix",
            summary="explains a given classifier, whose weights stay as they are (paper row I)",
            classifier="frozen",
            mask_in=_IN,
            mask_out=_OUT,
            first_masks="even",
            pretraining=0.5,
            # Pictures with grey holes are strange to a frozen classifier, so that fewer of them can be recognised.
            price=AreaPriceConfig(target=0.85, largest_leak=0.3, sufficiency=0.45),
            # A frozen classifier cannot learn pictures by heart, so the masker sees objects at the size that they have.
            augmentation=Augmentation(smallest_area=1.0, aspect=1.0),
        ),
        _paper("paper-ca", joint=True),
        _paper("paper-fix", joint=False),
        _casm("casm-l", 14.0, None, "the current classifier"),
        _casm("casm-fl", 7.5, PopulationConfig(save_every=10**9, size=1), "the first and the current classifier"),
        _casm("casm-l100", 10.0, PopulationConfig(save_every=100), "earlier classifiers, one kept every 100 steps"),
        _casm("casm-l1000", 10.0, PopulationConfig(save_every=1000), "earlier classifiers, one kept every 1000 steps"),
        Preset(
            name="dabkowski-gal",
            summary="real-time saliency's released loss: hinges, random fills, a masker told the class, at times a wrong one",
            classifier="frozen",
            mask_in=SideConfig(side="in", objective="hinge", margin=1.0, lambda_area=0.0),
            mask_out=SideConfig(
                side="out",
                objective="hinge",
                direction="minimize",
                margin=5.0,
                lambda_area=8.0,
                lambda_tv=0.005,
                area_rule="power",
            ),
            weight_in=0.3,
            relative_units=False,
            price=_FIXED,
            fill="random",
            masker=MaskerSpec(class_conditional=True),
            fakes=0.3,
            layers="all",
        ),
    )
}
