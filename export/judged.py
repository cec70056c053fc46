"""The last step of every export: run the gate, and write the artefact only when it passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.engine import Engine, OnnxEngine, default_threads
from export.files import write_bytes
from export.gate import ParityFailure, Thresholds, judge
from export.manifest import METADATA_KEY, Manifest, Parity
from export.parity_report import write_report
from export.source import Source
from export.throughput import measured
from export.verify import progress_bar, verdict_lines
from pipeline.errors import UsageError, WorkError

if TYPE_CHECKING:
    import onnx

Say = Callable[[str], Any]


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


def judge_engine(
    engine: Engine,
    source: Source,
    out: Path,
    judging: Judging,
    *,
    notes: Sequence[str] = (),
    batches: Sequence[int] = (),
    say: Say = str,
) -> Parity:
    """Run the gate on ``engine``; returns what a manifest keeps of it.

    Raises:
        ParityFailure: the verdict is no; the report beside ``out`` says why.
    """
    images = source.images(judging.data, judging.images, "--parity-data")
    reference = source.reference(judging.threads)
    hard = source.manifest.mask_values == "hard"
    thresholds = Thresholds.of(engine.info.precision, hard_masks=hard).with_drop(judging.max_drop)
    with progress_bar(2 * len(images.images), "parity") as advance:
        verdict = judge(reference, engine, images, thresholds=thresholds, batches=batches, progress=advance)
    page = Path(f"{out}.parity.html")
    if judging.report or not verdict.passed:
        write_report(page, verdict, images, model=reference.info, engine=engine.info, notes=list(notes))
    for line in verdict_lines(verdict, images, list(notes)):
        say(line)
    if not verdict.passed:
        hint = (
            "" if engine.info.precision == "fp32" else "; 'python -m export.trt --search' raises the layers that hurt"
        )
        raise ParityFailure(verdict.errors, str(out), f"; nothing written, see {page}{hint}")
    return Parity(
        against=f"{reference.info.kind} fp32",
        ran_on=f"{engine.info.kind} {engine.info.provider}",
        images=images.source,
        images_sha256=images.sha256,
        notes=list(notes),
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
    notes: Sequence[str] = (),
    say: Say = str,
) -> Manifest:
    """Write a graph to ``out`` when it passes the gate; returns its manifest with the gate's figures.

    ``stand_in``: what is run in its place where ONNX Runtime cannot run it.
    """
    draft = serialise(model if stand_in is None else stand_in, manifest)
    engine = OnnxEngine(out, provider="cpu", threads=judging.threads or default_threads(), data=draft)
    parity = judge_engine(engine, source, out, judging, notes=notes, say=say)
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
