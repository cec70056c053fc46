"""Judge whether an engine explains as its bundle does: tensors, classes, masks at work, boxes, and batch invariance.

Writes an HTML report with pictures of the worst images, and its figures as JSON; exits 1 when the gate says no.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.cli import Parser, run

DEFAULT_IMAGES = 500


def parser() -> Parser:
    """The command's flags."""
    flags = Parser("export.parity", __doc__ or "")
    flags.add_argument("--model", required=True, metavar="BUNDLE", help="the bundle that the engine was made from")
    flags.add_argument("--engine", required=True, metavar="FILE", help="an .onnx or .plan file (or another bundle)")
    flags.add_argument("--data", metavar="DIR", help="folder of images (default: the bundle's samples)")
    flags.add_argument("--images", type=int, default=DEFAULT_IMAGES, metavar="N", help="at most so many (default 500)")
    flags.add_argument("--batch", type=int, default=16, metavar="N", help="images run in one go (default 16)")
    flags.add_argument("--provider", choices=["auto", "cpu", "cuda", "tensorrt"], default="auto", help="where to run")
    flags.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    flags.add_argument("--max-drop", type=float, metavar="X", help="most that LE, OM, F1 and mask IoU may worsen")
    flags.add_argument("--report", metavar="FILE", help="the report (default: ENGINE.parity.html, JSON beside it)")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Run the gate."""
    arguments = parser().parse_args(argv)
    from export.build import batch_sizes_of
    from export.engine import PLAN_SUFFIXES
    from export.files import check_local, ensure_writable
    from export.gate import ParityFailure, Thresholds, judge, untried_batches
    from export.gate_images import gate_images
    from export.graph import GraphConfig
    from export.judged import check_numbers
    from export.manifest import read_sidecar
    from export.parity_report import write_report
    from export.torch_engine import TorchEngine
    from export.verify import hard_masks, matching_bundle, open_runnable, progress_bar, verdict_lines
    from pipeline.bundle import load_bundle

    check_numbers(arguments, "images", "batch", "threads")
    check_local(arguments, "model", "engine", "data", "report")
    bundle = load_bundle(arguments.model)
    report = Path(arguments.report or f"{Path(arguments.engine)}.parity.html")
    ensure_writable(report, "--report")
    engine, notes = open_runnable(Path(arguments.engine), provider=arguments.provider, threads=arguments.threads)
    matching_bundle(engine.info, bundle)
    images = gate_images(bundle.spec, bundle.samples, arguments.data, arguments.images)
    options = GraphConfig(**engine.info.manifest.get("options", {}))
    reference = TorchEngine(bundle.path, threads=arguments.threads, bundle=bundle, config=options)
    thresholds = Thresholds.of(engine.info.precision, hard_masks=hard_masks(bundle)).with_drop(arguments.max_drop)
    batches = [profile[key] for profile in engine.info.manifest.get("profiles", []) for key in ("opt", "max")]
    if Path(arguments.engine).suffix in PLAN_SUFFIXES:  # also where its graph, which has none, was judged in its place
        batches = batch_sizes_of(read_sidecar(arguments.engine).profiles)
    with progress_bar(2 * len(images.images), "parity") as advance:
        verdict = judge(
            reference, engine, images, thresholds=thresholds, batch=arguments.batch, batches=batches, progress=advance
        )
    notes += untried_batches(verdict, batches)
    calibration = engine.info.manifest.get("calibration") or {}
    if calibration.get("source") == images.source:
        notes.append(f"calibrated on {calibration['images']} images of {images.source}, which may be among these")
    page = write_report(report, verdict, images, model=reference.info, engine=engine.info, notes=notes)
    print(*verdict_lines(verdict, images, notes), f"report: {page}", sep="\n")
    if not verdict.passed:
        raise ParityFailure(verdict.errors, arguments.engine, f"; see {page}")


if __name__ == "__main__":
    run(main, "export.parity")
