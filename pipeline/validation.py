"""Judging checkpoints while the training goes on: a task of Ray Train beside the workers, and what becomes of its figures.

Every validated checkpoint leaves ``RUN/validation/<step>.json``, and ``RUN/validation.csv`` is made of them anew.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data import folders, store
from pipeline.errors import WorkError

if TYPE_CHECKING:
    from ray.train import Checkpoint

LOWER_IS_BETTER = ("LE", "OM")
HIGHER_IS_BETTER = ("F1", "F1a", "PxAP", "MaxBoxAccV2", "mask_iou", "top1", "top5")
NEED_BOXES = ("LE", "OM", "F1", "F1a", "MaxBoxAccV2")
NEED_MASKS = ("PxAP", "mask_iou")
SCORE, LEAST = "score", -1e9
"""The figure by which Ray Train keeps checkpoints, higher for better ones, and that of a checkpoint without validation."""
KEPT = (*LOWER_IS_BETTER, *HIGHER_IS_BETTER, "mask_mean", "mask_std", "entropy", "n_images")
FOLDER = "validation"


def validate(
    checkpoint: Checkpoint, *, run: str, data: str, images: int, threads: int, select: str | None
) -> dict[str, float]:
    """Figures of a checkpoint's bundle on ``images`` pictures of ``data``/val, always the same ones.

    ``run``: the run's folder or URI, which gets a record and TensorBoard's events.  ``select``: the figure that `SCORE`
    is made of.
    """
    import ray

    if not ray.get_gpu_ids():  # the GPUs of this machine belong to the workers
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    from pipeline.board import Board
    from pipeline.bundle import load_bundle
    from pipeline.evaluate import evaluate

    torch.set_num_threads(threads)
    with checkpoint.as_directory() as folder:
        bundle = load_bundle(Path(folder) / "bundle")
    step = int(bundle.spec.training["steps"])
    found = evaluate(bundle, data, limit=images, baselines=(), original="none", progress=False)
    figures = {name: float(found[name]) for name in KEPT if found.get(name) is not None}
    record = {"step": step, "seconds": bundle.spec.training["seconds"]} | figures
    board = Board(run, FOLDER)
    board.add(step, figures)
    board.close()
    store.write_bytes(record_of(run, step), (json.dumps(record) + "\n").encode())
    with contextlib.suppress(store.ReadError, WorkError):  # the table is made again with the next one
        collect(run)
    return scored(figures, select)


def scored(figures: dict[str, float], select: str | None) -> dict[str, float]:
    """``figures`` with the `SCORE` that the figure ``select`` makes, where it is among them."""
    if select is None or select not in figures:
        return figures
    return figures | {SCORE: -figures[select] if select in LOWER_IS_BETTER else figures[select]}


def judged(run: str, step: int, select: str | None) -> dict[str, float]:
    """What `validate` found after ``step`` steps of a run; nothing where it did not get so far."""
    data = store.read_optional(record_of(run, step))
    found = json.loads(data) if data else {}
    return scored({name: found[name] for name in KEPT if name in found}, select)


def forget(run: str, step: int) -> None:
    """Remove the record of a validation, if there is one; where nothing may be removed it stays."""
    place = record_of(run, step)
    with contextlib.suppress(store.ReadError, WorkError):
        if store.exists(place):
            store.delete(place)


def record_of(run: str, step: int) -> str:
    """Where the record of the validation after ``step`` steps is, once it has ended."""
    return store.join(store.place_of(run), FOLDER, f"{step:08d}.json")


def read_records(run: str) -> list[dict[str, Any]]:
    """All validations of a run, by step."""
    folder = store.join(store.place_of(run), FOLDER)
    records = [json.loads(store.read_bytes(e.place)) for e in folders.list_folder(folder) if e.place.endswith(".json")]
    return sorted(records, key=lambda record: record["step"])


def collect(run: str) -> None:
    """Write ``RUN/validation.csv``; nothing where nothing was validated."""
    records = read_records(run)
    if not records:
        return
    text = io.StringIO()
    columns = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    store.write_bytes(store.join(store.place_of(run), "validation.csv"), text.getvalue().encode())
