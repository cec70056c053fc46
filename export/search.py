"""Mixed precision: start low everywhere, and raise the layers that hurt until the explanation is whole.

The layers are ordered by what each of them does to mask and logits when it alone is lowered; then 1, 2, 4, ... of the
worst are restored by one step (`export.precision.Rewriter.rewrite`) until the loss in LE and in mask IoU is within the
limit, and the last stride is halved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.engine import Engine, OnnxEngine, default_threads
from export.figures import Answers, answers, localisation, per_image, summarise
from export.gate_images import GateImages
from export.judged import Judging, Say, judging_images, serialise
from export.precision import Rewriter, Rewritten
from export.source import Source
from export.throughput import images_per_second
from export.verify import progress_bar
from pipeline.errors import WorkError

if TYPE_CHECKING:
    import onnx

PROBED_IMAGES = 8
"""Images on which the harm of each single layer is measured."""
DEFAULT_DROP = 0.01


@dataclass(frozen=True, kw_only=True)
class Step:
    """One line of the table."""

    restored: tuple[str, ...]
    """Layers one step higher, worst first."""
    size: int
    """Bytes of the plan, or of the graph where none is built."""
    rate: float
    """Images per second of the graph in ONNX Runtime on this CPU."""
    loss_of_le: float | None
    """dLE; none where no image has a box."""
    mask_iou: float
    mask_mean_abs: float
    top1_agreement: float

    @property
    def loss(self) -> float:
        """The larger of dLE and 1 - mask IoU."""
        return max(1 - self.mask_iou, self.loss_of_le or 0.0)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found."""

    rewritten: Rewritten
    chosen: Step
    """The smallest one within the limit, else the last one."""
    steps: list[Step]
    """In the order in which they were tried."""
    order: list[str]
    """All layers, most harmful first."""
    within: bool
    """Whether any step is within the limit."""


def search(
    rewriter: Rewriter,
    source: Source,
    images: GateImages,
    *,
    max_drop: float,
    threads: int | None,
    size_of: Callable[[onnx.ModelProto], int],
    progress: Callable[[int], Any] | None = None,
) -> Found:
    """Find the fewest layers to restore, as far as the steps of the search can tell.

    ``size_of``: bytes of what becomes of a graph.  ``progress`` is told 1 for every layer that was probed.
    """
    reference = source.reference(threads)
    expected = answers(reference, images.images, batch=8)
    steps: dict[int, tuple[Step, Rewritten]] = {}

    def run_graph(rewritten: Rewritten) -> Engine:
        manifest = source.manifest.model_copy(update={"precision": rewritten.precision})
        data = serialise(rewritten.stand_in or rewritten.model, manifest)
        return OnnxEngine(Path("candidate.onnx"), provider="cpu", threads=threads or default_threads(), data=data)

    def attempt(restore: Sequence[str]) -> Step:
        if len(restore) not in steps:
            rewritten = rewriter.rewrite(restore)
            engine = run_graph(rewritten)
            found = answers(engine, images.images, batch=8)
            figures = summarise(per_image(expected, found), expected)
            step = Step(
                restored=tuple(restore),
                size=size_of(rewritten.model),
                rate=images_per_second(engine, images.images, batch=8, seconds=1.0),
                loss_of_le=_rise_of_le(expected, found, images, reference.info.input_size),
                mask_iou=figures["mask_iou"],
                mask_mean_abs=figures["mask_mean_abs"],
                top1_agreement=figures["top1_agreement"],
            )
            steps[len(restore)] = step, rewritten
        return steps[len(restore)][0]

    order: list[str] = []
    best = attempt(())
    if best.loss > max_drop:
        order = _by_harm(rewriter, run_graph, expected, images.images, progress)
        failed, count = 0, 1
        while best.loss > max_drop and failed < len(order):
            count = min(count, len(order))
            best = attempt(order[:count])
            if best.loss > max_drop:
                failed, count = count, 2 * count
        while best.loss <= max_drop and count - failed > 1:
            middle = (count + failed) // 2
            tried = attempt(order[:middle])
            if tried.loss <= max_drop:
                best, count = tried, middle
            else:
                failed = middle
    good = [step for step, _ in steps.values() if step.loss <= max_drop]
    if good:  # a kernel less can make a plan with fewer layers lowered the smaller one
        best = min(good, key=lambda step: (step.size, len(step.restored)))
    return Found(
        rewritten=steps[len(best.restored)][1],
        chosen=best,
        steps=[step for step, _ in steps.values()],
        order=order,
        within=bool(good),
    )


def searched(
    rewriter: Rewriter,
    source: Source,
    judging: Judging,
    *,
    calibration: GateImages | None,
    size_of: Callable[[onnx.ModelProto], int],
    say: Say = print,
) -> Rewritten:
    """`search` for the commands: on the images of the gate, with the table; returns the graph that was chosen.

    Raises:
        WorkError: no step is within the limit.
    """
    max_drop = judging.max_drop if judging.max_drop is not None else DEFAULT_DROP
    images, _ = judging_images(source, judging, calibration)
    with progress_bar(len(rewriter.candidates()), "search") as advance:
        found = search(
            rewriter, source, images, max_drop=max_drop, threads=judging.threads, size_of=size_of, progress=advance
        )
    say(f"search for a loss of at most {max_drop:g} in LE and mask IoU (* Pareto front, > chosen):")
    for line in table_lines(found):
        say(line)
    if not found.within:
        raise WorkError(
            f"no mix of {rewriter.name} and higher precisions keeps the loss within {max_drop:g}; allow more with "
            "--max-drop, or choose a higher --precision"
        )
    if found.order and len(found.chosen.restored) == len(found.order):
        say(
            f"every layer was raised: no multiplication is left in {rewriter.name}, and a higher --precision is as good"
        )
    return found.rewritten


def _rise_of_le(expected: Answers, found: Answers, images: GateImages, size: int) -> float | None:
    before = localisation(expected, images, size)
    return localisation(found, images, size)["LE"] - before["LE"] if before else None


def _by_harm(
    rewriter: Rewriter,
    run_graph: Callable[[Rewritten], Engine],
    expected: Answers,
    images: np.ndarray,
    progress: Callable[[int], Any] | None,
) -> list[str]:
    """The layers, the one first whose lowering alone changes mask and logits most."""
    some = images[:PROBED_IMAGES]
    deviation = float(expected.logits.std()) or 1.0
    layers = rewriter.candidates()
    harm: dict[str, float] = {}
    for layer in layers:
        found = answers(run_graph(rewriter.rewrite([other for other in layers if other != layer])), some, batch=8)
        masks = np.abs(found.masks - expected.masks[: len(some)]).mean()
        logits = np.abs(found.logits - expected.logits[: len(some)]).mean() / deviation
        harm[layer] = float(np.nan_to_num(masks + logits, nan=np.inf))
        if progress:
            progress(1)
    return sorted(layers, key=lambda layer: -harm[layer])


def pareto(steps: Sequence[Step]) -> list[Step]:
    """The steps that no other one beats in both size and loss, smallest first."""
    best: list[Step] = []
    for step in sorted(steps, key=lambda step: (step.size, step.loss)):
        if not best or step.loss < best[-1].loss:
            best.append(step)
    return best


def table_lines(found: Found) -> list[str]:
    """The table for the terminal; a star marks the Pareto front."""
    front = pareto(found.steps)
    lines = ["    restored          size   img/s (CPU)      dLE   mask IoU   top-1"]
    for step in sorted(found.steps, key=lambda step: len(step.restored)):
        change = "      -" if step.loss_of_le is None else f"{step.loss_of_le:+7.4f}"
        mark = ">" if step is found.chosen else "*" if step in front else " "
        lines.append(
            f"  {mark} {len(step.restored):12d} {step.size / 1e6:7.2f}MB {step.rate:13.1f} {change}    {step.mask_iou:7.4f} "
            f"{step.top1_agreement:7.4f}"
        )
    return lines
