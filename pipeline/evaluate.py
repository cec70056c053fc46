"""Score a model bundle on labelled images: `python -m pipeline.evaluate --model BUNDLE --data DIR --out METRICS.json`.

The localisation protocol of the paper (section 4) for the masks of the model and for what they have to beat, with
intervals, in one pass over the images.  500 images of 224 pixels with MobileNetV2 take about 270 seconds of processor time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.allocator import keep_freed_memory
from pipeline.cli import Parser, run
from pipeline.errors import UsageError, WorkError

if TYPE_CHECKING:
    import numpy as np

    from pipeline.bundle import Bundle
    from pipeline.metrics.boxes import Compat
    from pipeline.metrics.examples import Examples
    from pipeline.metrics.faithfulness import Protocol
    from pipeline.metrics.scorer import Explain, Scorer


def parser() -> Parser:
    p = Parser("pipeline.evaluate", "Score a model bundle on the labelled images of a folder.")
    p.add_argument("--model", required=True, metavar="BUNDLE", help="folder that pipeline.train wrote")
    p.add_argument("--data", required=True, metavar="DIR", help="data set with <split>/<class>/<image>")
    p.add_argument("--out", required=True, metavar="METRICS.json", help="where the figures go")
    p.add_argument("--boxes", metavar="CSV", help="true boxes (default: DIR/boxes.csv, when it is there)")
    p.add_argument("--masks", metavar="DIR", help="true masks, <split>/<class>/<stem>.png (default: DIR/masks)")
    p.add_argument("--split", default="val", help="which split to score (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (default: %(default)s)")
    p.add_argument("--limit", type=int, metavar="N", help="score only N images, drawn by the seed")
    p.add_argument("--seed", type=int, default=0, help="of --limit and of the bootstrap (default: %(default)s)")
    p.add_argument("--report", metavar="HTML", help="also write a report with a gallery")
    p.add_argument(
        "--compat",
        choices=["published"],
        help="score as the published code did, with its quirks, to compare with published figures",
    )
    p.add_argument(
        "--original",
        metavar="BUNDLE",
        help="bundle whose classifier the Saliency Metric asks, or 'none' to leave it out (default: the model's own)",
    )
    p.add_argument(
        "--target-area",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="wanted mask area, for maskers that take one (default: %(default)s)",
    )
    p.add_argument(
        "--explain",
        choices=["predicted", "label"],
        default="predicted",
        help="class that class-conditional maskers are told: the classifier's answer, or the true one (default: %(default)s)",
    )
    p.add_argument(
        "--faithfulness",
        type=int,
        default=0,
        metavar="N",
        help="also measure insertion, deletion, drop, gain, pointing, completeness and soundness on N images, "
        "440 passes of the classifier an image (default: none)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    keep_freed_memory()
    evaluation = run_evaluation(
        arguments.model,
        arguments.data,
        split=arguments.split,
        boxes=arguments.boxes,
        masks=arguments.masks,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        seed=arguments.seed,
        compat=arguments.compat,
        original=arguments.original,
        target_area=arguments.target_area,
        explain=arguments.explain,
        faithfulness=arguments.faithfulness,
    )
    write_metrics(evaluation.metrics, arguments.out)
    if arguments.report:
        from pipeline.report import write_report

        write_report(evaluation, arguments.report)
    print(headline(evaluation.metrics))
    print(f"figures: {arguments.out}" + (f"\nreport:  {arguments.report}" if arguments.report else ""))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one pass over the images yields."""

    metrics: dict[str, Any]
    """What `metrics.json` holds."""
    scorer: Scorer
    """The bundle's model with the figures per image."""
    examples: Examples
    rows: np.ndarray
    """(n,) number, in ``examples``, of each image that was scored."""


def evaluate(bundle: Bundle | str | Path, data: str | Path, **options: Any) -> dict[str, Any]:
    """The content of `metrics.json` for a bundle and a data set; the options are those of `run_evaluation`."""
    return run_evaluation(bundle, data, **options).metrics


def run_evaluation(
    bundle: Bundle | str | Path,
    data: str | Path,
    *,
    split: str = "val",
    boxes: str | Path | None = None,
    masks: str | Path | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    seed: int = 0,
    compat: Compat = None,
    original: str | None = None,
    target_area: float = 0.5,
    explain: Explain = "predicted",
    baselines: Sequence[str] | None = None,
    faithfulness: int = 0,
    faithfulness_protocol: Protocol | None = None,
    progress: bool = True,
) -> Evaluation:
    """Score ``bundle`` (a path, or loaded) on ``data``/``split``; see the command's flags for the meaning of the rest.

    ``baselines``: those to score beside the model, of `pipeline.metrics.scorer.BASELINES`; all by default.

    Raises:
        UsageError: something that was named is missing or does not fit.
        WorkError: not one image could be decoded.
    """
    import numpy as np
    from tqdm import tqdm

    from pipeline.bundle import load_bundle
    from pipeline.data.decode import ImageError
    from pipeline.metrics.examples import Example, Examples
    from pipeline.metrics.faithfulness import Protocol
    from pipeline.metrics.scorer import BASELINES, Scorer

    for name, value, least in (
        ("--batch-size", batch_size, 1),
        ("--limit", limit, 1),
        ("--faithfulness", faithfulness, 0),
    ):
        if value is not None and value < least:
            raise UsageError(f"{name} {value}: give a whole number of at least {least}")
    if not 0 < target_area < 1:
        raise UsageError(f"--target-area {target_area}: give a share between 0 and 1")
    if isinstance(bundle, (str, Path)):
        bundle = load_bundle(bundle)
    examples = Examples(data, bundle.spec, split=split, boxes=boxes, masks=masks, limit=limit, seed=seed, compat=compat)
    scorer = Scorer(
        bundle,
        judge=_judge(bundle, original),
        compat=compat,
        target_area=target_area,
        explain=explain,
        baselines=BASELINES if baselines is None else baselines,
    )
    scored: list[int] = []
    unreadable: list[str] = []
    first = 0
    with tqdm(total=len(examples), desc="evaluate", unit="img", disable=not progress) as bar:
        for batch in examples.batches(batch_size):
            good = [example for example in batch if not isinstance(example, ImageError)]
            for index, example in enumerate(batch, start=first):
                if isinstance(example, ImageError):
                    unreadable.append(f"{examples.paths[index]}: {example}")
                    bar.write(f"left out {unreadable[-1]}")
                else:
                    scored.append(index)
            if good:
                scorer.add(good)
            first += len(batch)
            bar.update(len(batch))
    if not scored:
        raise WorkError(f"not one image of {Path(data) / split} could be decoded; the first one: {unreadable[0]}")
    metrics = scorer.metrics(batch_size=batch_size, seed=seed)
    data_protocol = {"split": split, "images": len(scored), "limit": limit, "seed": seed, "unreadable": unreadable}
    metrics["protocol"] = {"data": data_protocol, **scorer.protocol(seed=seed)}
    if faithfulness > 0:
        drawn = np.sort(np.random.default_rng([seed, 0xFA17]).permutation(scored)[:faithfulness])
        batches = examples.batches(batch_size, indices=drawn.tolist())
        bar = tqdm(batches, desc="faithfulness", unit="batch", disable=not progress)
        protocol = faithfulness_protocol or Protocol(seed=seed)
        readable = ([example for example in batch if isinstance(example, Example)] for batch in bar)
        for name, figures in scorer.faithfulness(readable, protocol).items():
            (metrics if name == "model" else metrics["baselines"][name]).update(figures)
        metrics["protocol"]["faithfulness"] = {**protocol.describe(), "n": len(drawn)}
    return Evaluation(metrics=metrics, scorer=scorer, examples=examples, rows=np.array(scored))


def _judge(bundle: Bundle, original: str | None) -> Bundle | None:
    """The bundle whose classifier judges the cut-outs; None to leave the Saliency Metric out."""
    from pipeline.bundle import load_bundle

    if original == "none":
        return None
    if original is None:
        return bundle
    judge = load_bundle(original)
    if judge.spec.input_size != bundle.spec.input_size or judge.spec.data_classes != bundle.spec.data_classes:
        raise UsageError(
            f"--original {original} has another input size or other classes than the model; give a bundle that was "
            "trained on the same data at the same size"
        )
    return judge


def write_metrics(metrics: dict[str, Any], path: str | Path) -> None:
    """Write `metrics.json`.

    Raises:
        UsageError: ``path`` cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; give a writable --out") from error


def headline(metrics: dict[str, Any]) -> str:
    """A few lines for the terminal: the model beside the baselines."""
    columns = ("LE", "OM", "F1", "PxAP", "top1", "mask_mean")
    rows = {"model": metrics, **metrics["baselines"]}
    lines = [f"{metrics['n_images']} images, per cent".ljust(20) + "".join(f"{name:>11}" for name in columns)]
    for name, row in rows.items():
        cells = ("-" if row[column] is None else f"{100 * row[column]:.1f}" for column in columns)
        lines.append(name.ljust(20) + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, "pipeline.evaluate")
