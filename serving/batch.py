"""Score an image set: class, saliency mask and box of every image, as Parquet.

    python -m serving.batch --engine model.onnx --input photos/ --output scores/

Running it again does only what is missing: an output that is not finished goes on with the plan that it was begun with, and
nothing of the input is listed before that is done; then it takes up what has come or changed since.  A new engine or setting
begins a new version: the shards of the old one go to ``OUTPUT/_versions/`` and come back when its engine and settings do.
``OUTPUT`` read as a Parquet data set is exactly one row per input of the current version.  See `serving.ledger` for the rest
of the folder and `serving.rows` for the columns.

A tar file is one shard, scored by one worker: archives of about a gigabyte suit.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pipeline.cli import Parser, run

if TYPE_CHECKING:
    from serving.job import Prepared
    from serving.progress import Progress

NAME = "serving.batch"
PATIENCE_SECONDS = 120


def parser() -> Parser:
    result = Parser(NAME, "Score an image set with an engine: class, saliency mask and box of every image, as Parquet.")
    add = result.add_argument
    add("--engine", metavar="FILE_OR_BUNDLE", help="model.onnx, model.plan, or a bundle folder; every node must see it")
    add(
        "--input",
        metavar="URI",
        help="folder, glob, image, list (.txt, .csv), Parquet or WebDataset tar; local or s3://",
    )
    add("--output", metavar="URI", required=True, help="folder of the result; local or s3://")
    add("--batch-size", type=_positive, default=16, metavar="N", help="images in one call of the engine (default: 16)")
    add("--workers", type=_positive, metavar="N", help="engines that run at a time (default: as many as fit)")
    add("--cpus-per-worker", type=_positive, metavar="N", help="CPUs and threads of each (default: at most 4)")
    add("--num-gpus", type=_share, metavar="X", help="GPUs of each (default: 1 where the cluster has any)")
    add(
        "--decode-cpus",
        type=_count,
        default=0,
        metavar="N",
        help="CPUs that only decode, on any node (default: 0, workers decode)",
    )
    add("--autoscale", action="store_true", help="the cluster grows: ask for workers that do not fit yet")
    add("--provider", choices=("auto", "cpu", "cuda", "tensorrt"), default="auto", help="what runs an ONNX engine")
    add("--shard-size", type=_positive, metavar="N", help="images in one output file (default: by the size of the set)")
    add(
        "--max-pixels",
        type=_positive,
        default=100_000_000,
        metavar="N",
        help="larger images are error rows (default: 1e8)",
    )
    add("--draft", action="store_true", help="decode large JPEGs at 1/2, 1/4 or 1/8 of their size: faster, not exact")
    add(
        "--topk",
        type=_count,
        default=0,
        metavar="K",
        help="store the masks of the K best classes too (class-conditional engines; default: 0)",
    )
    add("--column", metavar="NAME", help="column of images or URIs, in Parquet (default: found by type and name)")
    add("--retry-errors", action="store_true", help="score images again that ended in an error row")
    add(
        "--overlays",
        type=_count,
        default=0,
        metavar="N",
        help="draw the N most and N least confident, in OUTPUT/_overlays",
    )
    add("--new-plan", action="store_true", help="list the input again, although OUTPUT is not finished")
    what = result.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print what is left and what it will cost; write nothing")
    what.add_argument("--status", action="store_true", help="print how far the jobs of OUTPUT have come")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    flags = parser().parse_args(argv)
    if flags.status:
        from serving.status import print_status

        print_status(flags.output)
        return
    for name in ("engine", "input"):
        if getattr(flags, name) is None:
            parser().error(f"--{name} is missing")
    from serving.job import BatchRequest, prepare, run_job

    values = {name: value for name, value in vars(flags).items() if name in BatchRequest.__dataclass_fields__}
    if not flags.engine.startswith("/"):
        values["engine"] = str(Path.cwd() / flags.engine)  # workers have another working directory
    request = BatchRequest(**values)
    prepared = prepare(request, dry=flags.dry_run)
    _announce(prepared)
    if flags.dry_run:
        return
    signal.signal(signal.SIGTERM, _interrupt)
    bar = Bar(prepared)
    try:
        job = run_job(prepared, watch=bar.update)
    finally:
        bar.close()
    print(f"{job.done} rows, {job.errors} of them errors, in {prepared.ledger.output}")
    if flags.overlays:
        from serving.overlays import draw_overlays

        folder = draw_overlays(prepared.ledger, prepared.version, prepared.plan, flags.overlays)
        print(f"overlays of the most and the least confident in {folder}")


class Bar:
    """Progress on standard error: images, per cent, images/s, time left, errors so far."""

    def __init__(self, prepared: Prepared) -> None:
        from tqdm import tqdm

        interactive = sys.stderr.isatty()
        self._bar = tqdm(
            total=prepared.plan.rows,
            initial=prepared.done_rows,
            unit="img",
            desc="scoring",
            mininterval=0.5 if interactive else 10.0,
            miniters=0,
            dynamic_ncols=interactive,
        )
        self._patience: threading.Timer | None = None
        if prepared.pending:
            self._patience = threading.Timer(PATIENCE_SECONDS, self._impatient)
            self._patience.daemon = True
            self._patience.start()

    def update(self, progress: Progress) -> None:
        if progress.scored and self._patience is not None:
            self._patience.cancel()
            self._patience = None
        self._bar.total = progress.total
        self._bar.set_postfix_str(f"{progress.errors} errors", refresh=False)
        self._bar.update(progress.done - self._bar.n)

    def _impatient(self) -> None:
        self._bar.write(
            f"no worker has finished a shard in {PATIENCE_SECONDS} s; is the cluster busy with other work?", sys.stderr
        )

    def close(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._bar.close()


def _announce(prepared: Prepared) -> None:
    """Say on standard output what there is, what is left, and what that will cost."""
    plan, pending = prepared.plan, prepared.pending
    total = (
        f"{plan.rows} inputs"
        if plan.rows is not None
        else f"{len(plan.shards)} shards of inputs (tar files are counted as they are read)"
    )
    print(f"{total}, {_megabytes(plan.size)}, in {len(plan.shards)} shards; version {prepared.version.id}")
    if not prepared.listed:
        print("the plan that the output was begun with; the input is listed again after it (--new-plan: before)")
    if plan.others:
        others = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in plan.others.items())
        print(f"left out: {sum(plan.others.values())} other files ({others})")
    if prepared.changed:
        print("another engine or setting than before: the old rows are put aside in _versions")
    left = f"{prepared.pending_rows} inputs" if prepared.pending_rows is not None else f"{len(pending)} shards"
    cost = [left, _megabytes(sum(shard.size for shard in pending)) + " to read"]
    rate = _known_rate(prepared)
    if rate and prepared.pending_rows is not None:
        cost.append(f"about {duration(prepared.pending_rows / rate)} at the last job's {rate:.1f} images/s")
    print(f"left: {', '.join(cost)}" if pending else "nothing is left to do")


def _known_rate(prepared: Prepared) -> float | None:
    rates = [job.images_per_second for job in prepared.ledger.jobs() if job.images_per_second]
    return rates[-1] if rates else None


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1000:
        raise ValueError(text)
    return value


_positive.__name__, _count.__name__, _share.__name__ = "positive number", "number", "number of GPUs"

if __name__ == "__main__":
    run(main, NAME)
