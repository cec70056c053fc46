"""The gate: does an engine give the explanations of the bundle that it was made from?  Thresholds, findings, verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from export.engine import Engine
from export.figures import (
    Answers,
    answers,
    batch_invariance,
    batch_sizes,
    displacement,
    further_outputs,
    localisation,
    other_sizes,
    per_image,
    summarise,
)
from export.gate_images import GateImages
from pipeline.errors import WorkError

MOST_COMPARED_BATCH = 64
"""Batch invariance is looked for up to this size on a CPU, where a batch of 256 takes a minute; on a GPU up to max."""
MOST_TIED = 0.1
"""No margin between two classes that is wider than this, in deviations of the logits, is a tie at any precision."""


class ParityError(WorkError):
    """A figure of the gate lies beyond its limit."""

    def __init__(self, figure: str, measured: float, limit: float, *, least: bool = False) -> None:
        self.figure, self.measured, self.limit = figure, measured, limit
        super().__init__(f"{figure} is {measured:.4g}, {'at least' if least else 'at most'} {limit:.4g} is wanted")


class LogitsError(ParityError):
    """The class logits differ."""


class Top1Error(ParityError):
    """The predicted class differs."""


class MaskError(ParityError):
    """The values of the masks differ."""


class MaskShapeError(ParityError):
    """The masks differ where it matters: at the operating threshold, or in the order of their cells."""


class LocalisationError(ParityError):
    """Boxes drawn from the masks fit the true ones worse."""


class BatchError(ParityError):
    """An answer depends on the batch that the image comes in."""


class ShapeError(ParityError):
    """The outputs have other shapes than the bundle's."""


class ParityFailure(WorkError):
    """The gate's verdict when it is no; ``errors`` says why."""

    def __init__(self, errors: Sequence[ParityError], what: str, where: str) -> None:
        self.errors = tuple(errors)
        first = "; ".join(str(error) for error in self.errors[:3])
        more = f"; and {len(self.errors) - 3} more" if len(self.errors) > 3 else ""
        super().__init__(f"{what} fails the parity gate: {first}{more}{where}")


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Limits of the gate.  Figures ending in ``rel`` are in units of the standard deviation of the logits."""

    logits_max_rel: float = 2e-3
    logits_mean_rel: float = 2e-4
    mask_max_abs: float = 2e-2
    """One cell; a steep sigmoid at the edge of an object turns float32's rounding into 1e-4, another compiler's more."""
    mask_mean_abs: float = 2e-4
    top1_agreement: float = 1.0
    """Least share of the images; a change between classes that are closer than twice ``logits_mean_rel`` is forgiven."""
    mask_iou: float = 0.998
    """Least mean IoU of the masks binarised at their mean."""
    rank_correlation: float = 0.998
    """Least mean Spearman correlation of the cells of the stored masks."""
    mask_shift: int = 0
    """Cells by which the masks fit better elsewhere, at any precision: none."""
    drop: float = 0.002
    """Most that LE and OM may rise, or F1 fall."""
    rows: float = 1e-5
    """Most that equal rows of one batch may differ, or a batch from its reverse: the same kernels made them."""
    batch: float = 1e-4
    """Most that an answer may depend on the size of its batch, for which other kernels may be chosen."""

    @classmethod
    def of(cls, precision: str, *, hard_masks: bool = False) -> Thresholds:
        """The limits for an engine of this precision.

        ``hard_masks``: masks hold only 0 and 1, so that a cell that rounding moves over the edge differs by 1.
        """
        found = _BY_PRECISION[precision]
        return replace(found, mask_max_abs=1.0) if hard_masks else found

    def with_drop(self, drop: float | None) -> Thresholds:
        """These limits with another most drop, also of the IoU of masks (``--max-drop``)."""
        if drop is None:
            return self
        return replace(self, drop=drop, mask_iou=1 - drop)


# fp16 keeps 11 bits and bf16 8: an error of 2^-11 and 2^-8 in each of some fifty layers, most of which cancel; the
# largest of half a million differences is loose, their mean is not.  int8 and
# fp8 are approximations: their differences in values say little, so that the explanation itself is what is judged.  A
# sure answer beyond what the calibration images gave is cut off (12.8 to 7.3 was seen, with the same class and mask),
# so the largest difference of a logit only has to be no nonsense.
_FP16 = Thresholds(
    logits_max_rel=0.2, logits_mean_rel=1e-2, mask_max_abs=0.3, mask_mean_abs=3e-3,
    top1_agreement=0.99, mask_iou=0.99, rank_correlation=0.99, drop=0.01, rows=2e-3, batch=1e-2,
)  # fmt: skip
_BF16 = replace(
    _FP16, logits_max_rel=1.5, logits_mean_rel=6e-2, mask_max_abs=1.0, mask_mean_abs=1.5e-2,
    top1_agreement=0.97, mask_iou=0.96, rank_correlation=0.97, rows=1e-2, batch=5e-2,
)  # fmt: skip
_INT8 = replace(
    _FP16, logits_max_rel=10.0, logits_mean_rel=0.25, mask_max_abs=1.0, mask_mean_abs=5e-2,
    top1_agreement=0.9, mask_iou=0.85, rank_correlation=0.9, drop=0.02, rows=1e-2, batch=5e-2,
)  # fmt: skip
_BY_PRECISION = {"fp32": Thresholds(), "fp16": _FP16, "bf16": _BF16, "int8": _INT8, "fp8": _INT8}

_KINDS: dict[str, type[ParityError]] = {
    "logits_max_rel": LogitsError,
    "logits_mean_rel": LogitsError,
    "mask_max_abs": MaskError,
    "mask_mean_abs": MaskError,
    "top1_agreement": Top1Error,
    "mask_iou": MaskShapeError,
    "rank_correlation": MaskShapeError,
    "mask_shift": MaskShapeError,
}
_LEAST = ("top1_agreement", "mask_iou", "rank_correlation")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate found."""

    figures: dict[str, Any]
    """`export.figures.summarise`, ``n_images``, ``dLE``, ``dOM``, ``dF1`` where there are boxes, ``outputs``, ``batch``."""
    columns: dict[str, np.ndarray]
    """The figures of each image (n,)."""
    reference: Answers
    tested: Answers
    thresholds: Thresholds
    errors: tuple[ParityError, ...]

    @property
    def passed(self) -> bool:
        return not self.errors

    def summary(self) -> dict[str, Any]:
        """What a manifest and `parity.json` keep."""
        return {
            "passed": self.passed,
            "errors": [{"kind": type(error).__name__, "message": str(error)} for error in self.errors],
            "figures": self.figures,
            "thresholds": asdict(self.thresholds),
        }


def judge(
    reference: Engine,
    tested: Engine,
    images: GateImages,
    *,
    thresholds: Thresholds,
    batch: int = 16,
    batches: Sequence[int] = (),
    largest_batch: int = MOST_COMPARED_BATCH,
    progress: Callable[[int], Any] | None = None,
) -> Verdict:
    """Run both engines over ``images`` and compare.

    ``batch``: images in one go; ``batches``: further batch sizes (opt and max of the profiles) whose answers must
    agree; ``largest_batch``: up to which, on a CPU or without ``batches``.  ``progress`` is told how many images were
    run.
    """
    batch = min(batch, tested.info.max_batch or batch)
    expected = answers(reference, images.images, batch=batch, progress=progress)
    found = answers(tested, images.images, batch=batch, progress=progress)
    if (expected.logits.shape, expected.masks.shape) != (found.logits.shape, found.masks.shape):
        wrong = ShapeError("number of values", _values(found), _values(expected))
        return Verdict(
            figures={"n_images": len(images.images)}, columns={}, reference=expected, tested=found,
            thresholds=thresholds, errors=(wrong,),
        )  # fmt: skip
    columns = per_image(expected, found)
    strictly = float(columns["top1_same"].mean())
    _forgive_ties(columns, expected, thresholds)
    figures: dict[str, Any] = {"n_images": len(images.images), **summarise(columns, expected)}
    figures["top1_strict_agreement"] = strictly
    figures["mask_shift"] = displacement(expected, found)
    size = reference.info.input_size
    before, after = localisation(expected, images, size), localisation(found, images, size)
    figures |= {"n_boxes": images.annotated, **{f"reference_{name}": value for name, value in before.items()}}
    figures |= {f"d{name}": after[name] - before[name] for name in before}
    most = tested.info.max_batch or max([largest_batch, *batches])
    if tested.info.provider == "cpu":
        most = min(most, largest_batch)
    figures["outputs"] = further_outputs(reference, tested, images.images[:batch])
    figures["batch"] = batch_invariance(tested, images.images, batch_sizes((*batches, most), most))
    if reference.info.any_size and tested.info.any_size:
        figures["sizes"] = other_sizes(reference, tested, images.images)
    errors = check(figures, thresholds)
    return Verdict(
        figures=figures, columns=columns, reference=expected, tested=found, thresholds=thresholds, errors=errors
    )


def _values(found: Answers) -> int:
    return int(np.prod(found.logits.shape) + np.prod(found.masks.shape))


def _forgive_ties(columns: dict[str, np.ndarray], reference: Answers, thresholds: Thresholds) -> None:
    """Another class counts as the same where the reference itself holds the first two for equally likely."""
    ordered = np.sort(reference.logits, axis=1)
    margin = (ordered[:, -1] - ordered[:, -2]) / (reference.logits.std() or 1.0)
    tied = margin <= min(2 * thresholds.logits_mean_rel, MOST_TIED)
    columns["top1_same"] = np.maximum(columns["top1_same"], tied)


def check(figures: dict[str, Any], thresholds: Thresholds) -> tuple[ParityError, ...]:
    """The figures that lie beyond their limits; one that is not a number lies beyond any."""
    errors: list[ParityError] = []
    for field in fields(thresholds):
        limit = getattr(thresholds, field.name)
        if field.name in _KINDS:
            measured, least = figures[field.name], field.name in _LEAST
            if not (measured >= limit if least else measured <= limit):
                errors.append(_KINDS[field.name](field.name, measured, limit, least=least))
    for name, worse in (("LE", 1), ("OM", 1), ("F1", -1)):
        change = figures.get(f"d{name}")
        if change is not None and not worse * change <= thresholds.drop:
            errors.append(LocalisationError(f"d{name}", change, worse * thresholds.drop, least=worse < 0))
    for name, value in figures["outputs"].items():
        if not value <= thresholds.mask_max_abs:
            errors.append(MaskError(name, value, thresholds.mask_max_abs))
    for name, value, kind in size_figures(figures.get("sizes", {})):
        limit = getattr(thresholds, kind)
        if not value <= limit:
            errors.append(_KINDS[kind](name, value, limit))
    for name, value, kind in batch_figures(figures["batch"]):
        limit = getattr(thresholds, kind)
        if not value <= limit:
            errors.append(BatchError(name, value, limit))
            break  # one cause
    return tuple(errors)


def untried_batches(verdict: Verdict, batches: Sequence[int]) -> list[str]:
    """What has to be said where some of ``batches`` are larger than any batch that was compared."""
    tried = max((int(size) for size in verdict.figures.get("batch", {}).get("equal_rows", {})), default=0)
    larger = sorted({size for size in batches if size > tried})
    if not larger or not tried:
        return []
    names = ", ".join(map(str, larger))
    return [f"batches of {names} were not tried: on a CPU the largest one compared is {tried}; judge again on a GPU"]


def size_figures(sizes: dict[str, Any]) -> list[tuple[str, float, str]]:
    """The figures of `export.figures.other_sizes` as (what, value, which threshold)."""
    return [(f"{kind} at {size}", value, kind) for size, apart in sizes.items() for kind, value in apart.items()]


def batch_figures(batch: dict[str, Any]) -> list[tuple[str, float, str]]:
    """The figures of `export.figures.batch_invariance` as (what, value, which threshold)."""
    rows = [(f"the spread of equal rows at batch {size}", value, "rows") for size, value in batch["equal_rows"].items()]
    sizes = [(f"batch {size} against the largest", value, "batch") for size, value in batch["by_size"].items()]
    return [*rows, ("a batch against its reverse", batch["order"], "rows"), *sizes]
