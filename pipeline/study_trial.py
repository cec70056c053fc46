"""One run of the study: train a row with a seed, judge it, and keep a record of under 1 KB."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.reporting import FolderReporter
from pipeline.study_rows import Row, definition_of

KEPT = ("LE", "OM", "F1", "PxAP", "MaxBoxAccV2", "mask_iou", "mask_mean", "mask_std", "entropy", "top1", "top5")
"""Figures of `metrics.json` that a record keeps; not the Saliency Metric, which takes longer than a short training."""
COMPARED_IMAGES = 200
"""Validation images on which the classifier before is compared with the one after and with its snapshots."""
DEFINITION = "definition"
"""File beside a trial's state that says what it is trained by (`definition_of`)."""


def run_trial(
    row: Row,
    seed: int,
    arguments: list[str],
    *,
    folder: Path,
    threads: int,
    tell: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Train and judge; goes on from the checkpoint in ``folder`` where there is one of the same definition.

    ``arguments``: of `pipeline.train`, the same for every row.  Returns the record.

    Raises:
        UsageError: an argument, the data or the weights are not usable.
    """
    from pipeline import training
    from pipeline.evaluate import evaluate
    from pipeline.planning import plan_training
    from pipeline.train import parser

    settings = [part for setting in row.settings for part in ("--set", setting)]
    own = ["--preset", row.preset, "--out", str(folder), "--seed", str(seed), *row.arguments, *settings]
    parsed = parser().parse_args([*arguments, *own])
    plan = replace(plan_training(parsed), threads=threads)
    started = time.monotonic()
    definition = definition_of(row, seed, arguments)
    keep_only(folder, definition)
    state = folder / "state"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    resume = state if (state / "state.pt").is_file() else None
    if resume is None or not (state / "bundle").is_dir():
        training.train(plan, FolderReporter(state, tell), resume=resume, device=device)
    explain = "label" if row.by_label else "predicted"
    metrics = evaluate(
        state / "bundle", plan.data, explain=explain, baselines=("cam",), original="none", progress=False
    )
    record: dict[str, Any] = {
        "row": row.name,
        "seed": seed,
        "definition": definition,
        "config": {"preset": row.preset, "settings": row.settings, "arguments": [*arguments, *row.arguments]},
        "metrics": {name: _rounded(metrics.get(name)) for name in KEPT},
        "cam": _rounded(metrics["baselines"]["cam"]["LE"]),
        "seconds": round(time.monotonic() - started, 1),
    }
    spec = json.loads((state / "bundle" / "model.json").read_text(encoding="utf-8"))
    record["steps"] = spec["training"]["steps"]
    if plan.weights is not None:
        record["classifier"] = {name: _rounded(v) for name, v in _changed(plan, state / "bundle").items()}
    return record


def keep_only(folder: Path, definition: str) -> None:
    """Empty ``folder`` unless what it holds was trained by ``definition``: nothing else may be resumed or judged."""
    path = folder / DEFINITION
    if path.is_file() and path.read_text(encoding="utf-8") == definition:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path.write_text(definition, encoding="utf-8")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 5)


def _changed(plan: Any, bundle_folder: Path) -> dict[str, float]:
    """The classifier that the run began with beside the one that it ended with, and beside the snapshot farthest from it."""
    from pipeline.bundle import load_bundle
    from pipeline.connectivity import compare_classifiers
    from pipeline.metrics.examples import Example, Examples
    from pipeline.training import Normaliser, build

    bundle = load_bundle(bundle_folder)
    before = build(plan)[0].backbone
    snapshot = copy.deepcopy(before)
    examples = Examples(plan.data, bundle.spec, split="val", limit=COMPARED_IMAGES, seed=0)
    shown = [e for batch in examples.batches(32) for e in batch if isinstance(e, Example)]
    x = Normaliser(bundle.spec.mean, bundle.spec.std, "cpu")(np.stack([example.image for example in shown]))
    targets = torch.tensor([bundle.spec.class_index[example.label] for example in shown])
    found = compare_classifiers(before, bundle.model.backbone, x, targets)
    saved = torch.load(bundle_folder.parent / "state.pt", map_location="cpu", weights_only=True)["population"]
    compared = []
    for state in saved:
        snapshot.load_state_dict(state)
        compared.append(compare_classifiers(before, snapshot, x, targets))
    if compared:
        found["agreement_snapshots"] = min(pair["agreement"] for pair in compared)
        found["loss_barrier_snapshots"] = max(pair["loss_barrier"] for pair in compared)
    return found
