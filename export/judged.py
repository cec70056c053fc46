"""The last step of every export: run the gate, and write the artefact only when it passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.engine import Engine, OnnxEngine, default_threads
from export.files import write_bytes
from export.gate import ParityFailure, Thresholds, judge, untried_batches
from export.gate_images import GateImages, apart_from
from export.manifest import METADATA_KEY, Manifest, Parity
from export.parity_report import write_report
from export.source import Source
from export.throughput import measured
from export.verify import progress_bar, verdict_lines
from pipeline.errors import UsageError, WorkError

if TYPE_CHECKING:
    import onnx

    from export.precision import Rewriter, Rewritten

Say = Callable[[str], Any]

FEW = 8
"""Images on which a float32 graph is held to the strict limits: a fault that is in it shows on any of them."""


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How an export is judged."""

    data: str | None = None
    """Folder of images; else the bundle's samples, else noise."""
    images: int = 256
    """At most so many."""
    max_drop: float | None = None
    """Most that LE, OM, F1 and mask IoU may worsen, instead of what the precision's thresholds say."""
    threads: int | None = None
    """CPU threads."""
    report: bool = False
    """Write the report also when the gate passes."""

    @classmethod
    def of(cls, arguments: Any) -> Judging:
        """From the flags of `export.precision.add_judging`.

        Raises:
            UsageError: a number that cannot be meant.
        """
        check_numbers(arguments, "parity_images", "threads")
        return cls(
            data=arguments.parity_data,
            images=arguments.parity_images,
            max_drop=arguments.max_drop,
            threads=arguments.threads,
            report=arguments.report,
        )


def check_numbers(arguments: Any, *counts: str) -> None:
    """Make sure that the flags ``counts`` are at least 1 where they are given, and ``--max-drop`` a share.

    Raises:
        UsageError: names the flag.
    """
    for name in counts:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: use a number from 1 up")
    if arguments.max_drop is not None and not 0 <= arguments.max_drop <= 1:
        raise UsageError(f"--max-drop {arguments.max_drop:g}: use a share between 0 and 1, such as 0.01")


def judging_images(source: Source, judging: Judging, calibration: GateImages | None) -> tuple[GateImages, list[str]]:
    """What an export is judged on, and what has to be said about it: images that it was not calibrated on, if any."""
    images = source.images(judging.data, judging.images, "--parity-data", calibration=calibration)
    count = len(images.images)
    seen = count - len(apart_from(images, calibration).images) if calibration is not None else 0
    if not seen:
        return images, []
    return images, [f"judged on images of which {seen} of {count} were calibrated on too: give --parity-data others"]


def check_source(source: Source, judging: Judging) -> list[str]:
    """Hold the float32 graph to its own limits before it is rewritten; returns what has to be said about it.

    A fault that is in it could pass for the error of a lower precision afterwards.

    Raises:
        ParityFailure: it does not answer as the bundle does, or depends on the batch.
    """
    remedy = f"'python -m export.onnx --model {source.path} --out FILE' shows where"
    if source.bundle is None:
        remedy = f"export {source.path} again with 'python -m export.onnx'"
    _check_float32(source.model, source, judging, what="the float32 graph to start from", remedy=remedy)
    return [] if source.bundle else [f"no bundle was at hand, so {source.path.name} itself was taken for right"]


def _check_float32(model: onnx.ModelProto, source: Source, judging: Judging, *, what: str, remedy: str) -> None:
    threads = judging.threads or default_threads()
    engine = OnnxEngine(source.path, provider="cpu", threads=threads, data=serialise(model, source.manifest))
    thresholds = Thresholds.of("fp32", hard_masks=source.manifest.mask_values == "hard").with_drop(judging.max_drop)
    reference, errors = source.reference(threads), ()
    for count in (FEW, max(FEW, judging.images)):  # one odd mask of a few weighs more than its share of all
        images = source.images(judging.data, count, "--parity-data")
        errors = judge(reference, engine, images, thresholds=thresholds, largest_batch=FEW).errors
        if not errors:
            return
    raise ParityFailure(errors, what, f"; nothing written, {remedy}")


def check_rewriting(rewriter: Rewriter, rewritten: Rewritten, source: Source, judging: Judging) -> list[str]:
    """Hold what ``rewritten`` computes but for its rounding to float32's limits; returns what has to be said about it.

    A layer scaled by 1.05 or a wrong mean moves logits and masks by no more than int8 does, and no more in one direction
    (ResNet-18: the mean shift of a logit is 0.017 deviations in an honest int8 graph, 0.021 with a wrong mean), so that
    only without the rounding they can be told apart.  What cannot be: a weight changed by less than its rounding, and
    the range of an activation, which is left to the limits of the precision.

    Raises:
        ParityFailure: more was changed than the rounding.
    """
    if rewritten.precision == "fp32":
        return []
    model = rewriter.unrounded(rewritten)
    if model is None:
        return ["ModelOpt's changes cannot be undone, so its graph was held to the limits of its precision alone"]
    _check_float32(
        model, source, judging, what=f"the {rewriter.name} graph, without its rounding,",
        remedy="the rewriting changed more than it should: choose another --precision, and report it",
    )  # fmt: skip
    return []


def judge_engine(
    engine: Engine,
    source: Source,
    out: Path,
    judging: Judging,
    *,
    calibration: GateImages | None = None,
    notes: Sequence[str] = (),
    batches: Sequence[int] = (),
    say: Say = str,
) -> Parity:
    """Run the gate on ``engine``; returns what a manifest keeps of it.

    ``calibration``: what the engine's ranges were measured on.

    Raises:
        ParityFailure: the verdict is no; the report beside ``out`` says why.
    """
    images, remarks = judging_images(source, judging, calibration)
    reference = source.reference(judging.threads)
    hard = source.manifest.mask_values == "hard"
    thresholds = Thresholds.of(engine.info.precision, hard_masks=hard).with_drop(judging.max_drop)
    with progress_bar(2 * len(images.images), "parity") as advance:
        verdict = judge(reference, engine, images, thresholds=thresholds, batches=batches, progress=advance)
    notes = [*notes, *remarks, *untried_batches(verdict, batches)]
    page = Path(f"{out}.parity.html")
    if judging.report or not verdict.passed:
        write_report(page, verdict, images, model=reference.info, engine=engine.info, notes=notes)
    for line in verdict_lines(verdict, images, notes):
        say(line)
    if not verdict.passed:
        hint = "" if engine.info.precision == "fp32" else "; --search raises the layers that hurt"
        raise ParityFailure(verdict.errors, str(out), f"; nothing written, see {page}{hint}")
    return Parity(
        against=f"{reference.info.kind} fp32",
        ran_on=f"{engine.info.kind} {engine.info.provider}",
        images=images.source,
        images_sha256=images.sha256,
        notes=notes,
        **verdict.summary(),
    )


def write_judged(
    model: onnx.ModelProto,
    manifest: Manifest,
    source: Source,
    out: Path,
    judging: Judging,
    *,
    stand_in: onnx.ModelProto | None = None,
    calibration: GateImages | None = None,
    notes: Sequence[str] = (),
    say: Say = str,
) -> Manifest:
    """Write a graph to ``out`` when it passes the gate; returns its manifest with the gate's figures.

    ``stand_in``: what is run in its place where ONNX Runtime cannot run it.  ``calibration``: see `judge_engine`.
    """
    draft = serialise(model if stand_in is None else stand_in, manifest)
    engine = OnnxEngine(out, provider="cpu", threads=judging.threads or default_threads(), data=draft)
    parity = judge_engine(engine, source, out, judging, calibration=calibration, notes=notes, say=say)
    rates = measured(engine, source.images(None, 8, "--parity-data").images, opt=8)
    if stand_in is not None:
        rates["on"] += ": an emulation's speed, not the graph's"
    manifest = manifest.model_copy(update={"parity": parity, "throughput": rates})
    write_bytes(out, serialise(model, manifest))
    return manifest


def serialise(model: onnx.ModelProto, manifest: Manifest) -> bytes:
    """The bytes of ``model`` with ``manifest`` in its metadata."""
    from google.protobuf.message import EncodeError

    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, manifest.model_dump_json()
    try:
        return model.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise WorkError(
            f"the graph does not fit one ONNX file of 2 GB ({error}); export a smaller classifier"
        ) from error
