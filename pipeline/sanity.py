"""Do the masks depend on the classifier?  ``python -m pipeline.sanity --model BUNDLE --data DIR --out DIR``.

Five questions, one plot each: cascading and independent randomisation of the classifier under the trained masker, both
again with a masker retrained for each classifier (``--retrain STEPS``), and a model that learnt random labels
(``--labels STEPS``; as many as it takes to have 95 % of its training images right, which the last line says).  64 images
of 224 pixels with MobileNetV2 take about 5 minutes on 2 CPU cores without retraining; every retraining costs its steps.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.cli import Parser, run
from pipeline.errors import UsageError, WorkError

TITLES = {
    "cascading": "fresh weights from the output down, masker fixed",
    "independent": "fresh weights in one module, masker fixed",
    "cascading-retrained": "fresh weights from the output down, masker retrained",
    "independent-retrained": "fresh weights in one module, masker retrained",
    "labels": "model trained on random labels",
}
LEAST_IMAGES = 2
"""Fewer have no statistics."""


def parser() -> Parser:
    """The command line."""
    p = Parser("pipeline.sanity", "Compare the masks of a bundle with those of randomised classifiers.")
    p.add_argument("--model", required=True, metavar="BUNDLE", help="folder that pipeline.train wrote")
    p.add_argument("--data", required=True, metavar="DIR", help="image folder with val/, and train/ for retraining")
    p.add_argument("--out", required=True, metavar="DIR", help="where sanity.json and the plots go")
    p.add_argument("--images", type=int, default=64, metavar="N", help="validation images (default: %(default)s)")
    p.add_argument("--depth", type=int, default=2, help="levels of nesting of the modules (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of images and weights (default: %(default)s)")
    p.add_argument(
        "--retrain", type=int, default=0, metavar="STEPS", help="retrain a masker for each randomised classifier"
    )
    p.add_argument(
        "--points", type=int, default=3, metavar="N", help="randomised classifiers that get one (default: %(default)s)"
    )
    p.add_argument("--labels", type=int, default=0, metavar="STEPS", help="train models on true and on random labels")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Run the checks and draw them.

    Raises:
        UsageError: an argument, the bundle or the data are not usable.
        WorkError: no image could be read.
    """
    arguments = parser().parse_args(argv)
    for name, least in (("images", LEAST_IMAGES), ("depth", 1), ("points", 1)):
        if getattr(arguments, name) < least:
            raise UsageError(f"--{name} {getattr(arguments, name)}: give a number of at least {least}")
    import numpy as np
    from tqdm import tqdm

    from pipeline import randomisation
    from pipeline.bundle import load_bundle
    from pipeline.metrics.examples import Example, Examples
    from pipeline.training import Normaliser

    bundle = load_bundle(arguments.model)
    out = Path(arguments.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written ({error.strerror}); give a writable folder") from error
    examples = Examples(arguments.data, bundle.spec, limit=arguments.images, seed=arguments.seed)
    shown = [e for batch in examples.batches(32) for e in batch if isinstance(e, Example)]
    if len(shown) < LEAST_IMAGES:
        raise WorkError(
            f"{len(shown)} images of {arguments.data}/val could be decoded, and the statistics of BatchNorm take "
            f"{LEAST_IMAGES}; give a --data with more"
        )
    x = Normaliser(bundle.spec.mean, bundle.spec.std, "cpu")(np.stack([example.image for example in shown]))
    common = {"depth": arguments.depth, "seed": arguments.seed}
    results: dict[str, list[tuple[str, dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        checks: dict[str, Iterable[tuple[str, dict[str, float]]]] = {
            "cascading": randomisation.fixed_masker(bundle, x, cascading=True, **common),
            "independent": randomisation.fixed_masker(bundle, x, cascading=False, **common),
        }
        if arguments.retrain:
            for kind in ("cascading", "independent"):
                checks[f"{kind}-retrained"] = randomisation.retrained_masker(
                    bundle,
                    x,
                    arguments.data,
                    cascading=kind == "cascading",
                    steps=arguments.retrain,
                    points=arguments.points,
                    folder=Path(folder) / kind,
                    **common,
                )
        if arguments.labels:
            checks["labels"] = randomisation.random_labels(
                bundle, x, arguments.data, seed=arguments.seed, steps=arguments.labels, folder=Path(folder) / "labels"
            )
        for name, pairs in checks.items():
            results[name] = list(tqdm(pairs, desc=name, unit="classifier"))
            draw(results[name], out / f"{name}.png", TITLES[name])
    plain = {
        name: [
            {"module": module} | {k: None if math.isnan(v) else round(v, 5) for k, v in row.items()}
            for module, row in rows
        ]
        for name, rows in results.items()
    }
    fitted = "".join(
        f"; {name} right on {row['training_accuracy']:.0%} of the training images"
        for name, row in results.get("labels", ())
    )
    protocol = {"images": len(shown), "depth": arguments.depth, "seed": arguments.seed, "retrain": arguments.retrain}
    (out / "sanity.json").write_text(json.dumps({"protocol": protocol, **plain}, indent=1) + "\n", encoding="utf-8")
    for name, rows in results.items():
        (first, one), (last, other) = rows[0], rows[-1]
        print(
            f"{TITLES[name]}: rank correlation {one['spearman']:.2f} ({first}) to {other['spearman']:.2f} ({last})"
            + (fitted if name == "labels" else "")
        )
    print(f"figures and plots: {out}")


def draw(rows: Sequence[tuple[str, dict[str, float]]], path: Path, title: str) -> None:
    """One plot: the likeness of the masks for each randomised classifier."""
    from matplotlib.figure import Figure

    from pipeline.randomisation import MEASURES

    figure = Figure(figsize=(max(5.0, 0.35 * len(rows) + 3), 4.2), layout="constrained")
    axes = figure.subplots()
    for measure, marker in zip(MEASURES, "osD^", strict=True):
        axes.plot(range(len(rows)), [row[measure] for _, row in rows], marker=marker, markersize=4, label=measure)
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [name for name, _ in rows], rotation=60, ha="right", fontsize=8)
    axes.set_ylim(-1.05, 1.05)
    axes.set_ylabel("likeness to the masks of the model")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(main, "pipeline.sanity")
