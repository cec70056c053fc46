"""Ray Train's list of a run's checkpoints, made anew where it does not hold.

Ray writes the list in place: a driver that is killed in the middle leaves half of one, with which Ray refuses to begin
again, whole as the checkpoints are.  So it does when a checkpoint of the list is gone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.fs
import ray

from pipeline.run_folder import write_whole
from pipeline.snapshots import FOLDER, file_name
from pipeline.validation import LEAST, SCORE

INDEX_FILE = "checkpoint_manager_snapshot.json"
"""Ray's name for the list."""


def mend_index(
    filesystem: pyarrow.fs.FileSystem, folder: str, judged: Callable[[int], dict[str, float]] = lambda step: {}
) -> str | None:
    """Make the list of the run's checkpoints in ``folder`` hold again where it is torn or names one that is gone.

    Returns what was done, for the user; none where the list holds, or there is neither list nor checkpoint.  The new list
    holds the newest checkpoint that is whole, and earlier ones of whose step ``judged`` knows figures, by which the best is
    kept; without a whole one there is no list, and the run begins anew.

    Raises:
        OSError: the store or the disk does not answer.
    """
    path = f"{folder}/{INDEX_FILE}"
    there = {
        info.base_name
        for info in filesystem.get_file_info(pyarrow.fs.FileSelector(folder, allow_not_found=True))
        if info.type == pyarrow.fs.FileType.Directory and info.base_name.startswith("checkpoint_")
    }
    text, exists = b"", filesystem.get_file_info(path).type == pyarrow.fs.FileType.File
    if exists:
        with filesystem.open_input_stream(path) as stream:
            text = stream.read()
    elif not there:
        return None
    try:
        if {result["checkpoint_dir_name"] for result in json.loads(text)["checkpoint_results"]} <= there:
            return None
        trouble = "names a checkpoint that is gone"
    except (ValueError, KeyError, TypeError):
        trouble = "was torn" if exists else "was not there"
    kept: list[tuple[str, int, dict[str, float]]] = []
    for name in sorted(there, reverse=True):
        found = read_checkpoint(filesystem, folder, name)
        # The newest one to go on from comes first; before it, those that may be the best.
        if found is not None and (kept or found.resumable):
            figures = judged(found.step) if found.has_bundle else {}
            if figures or not kept:
                kept.append((name, found.step, figures))
    if kept:
        write_whole(filesystem, path, json.dumps(_index_of(kept[::-1])).encode())
        name, step, _ = kept[0]
        return f"{path} {trouble}; going on from {name}, step {step}"
    if exists:
        filesystem.delete_file(path)
    return f"{path} {trouble}, and no checkpoint beside it is whole; beginning anew"


class Found(NamedTuple):
    """A checkpoint all of whose files can be read."""

    step: int
    resumable: bool
    """Whether the snapshots of the classifier that it names, which lie beside the checkpoints, are there."""
    has_bundle: bool


def read_checkpoint(filesystem: pyarrow.fs.FileSystem, folder: str, name: str) -> Found | None:
    """What a checkpoint holds; none for one that was cut off while it was copied.

    Raises:
        OSError: the store or the disk does not answer, which says nothing of the checkpoint.
    """
    import torch

    from pipeline.bundle import load_bundle

    with tempfile.TemporaryDirectory() as scratch:
        try:
            pyarrow.fs.copy_files(f"{folder}/{name}", scratch, source_filesystem=filesystem)
        except FileNotFoundError:
            return None
        has_bundle = (Path(scratch) / "bundle").is_dir()
        try:
            state = torch.load(Path(scratch) / "state.pt", map_location="cpu", weights_only=True)
            rows = (Path(scratch) / "log.csv").read_text(encoding="utf-8").splitlines()
            if has_bundle:
                load_bundle(Path(scratch) / "bundle")
        except Exception:  # what torch's unpickler says of damage has no base of its own
            return None
    if len(rows) != int(state["step"]) + 1:
        return None
    beside = f"{folder.rpartition('/')[0]}/{FOLDER}"
    needed = [] if state["population"] else [f"{beside}/{file_name(taken)}" for taken in state["snapshots"]]
    there = all(info.type == pyarrow.fs.FileType.File for info in filesystem.get_file_info(needed))
    return Found(int(state["step"]), resumable=there, has_bundle=has_bundle)


def _index_of(whole: Sequence[tuple[str, int, dict[str, float]]]) -> dict[str, Any]:
    """Ray's list (`ray.train.v2`'s `_CheckpointManagerState`) of checkpoints (name, step, figures), oldest first."""
    results = [
        {
            "version": 0,
            "checkpoint_dir_name": name,
            "metrics": {"step": step, "final": 0, SCORE: LEAST} | figures,
        }
        for name, step, figures in whole
    ]
    # The worst first, as Ray keeps them; equal ones by age.
    order = sorted(range(len(results)), key=lambda k: results[k]["metrics"][SCORE])
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": [results[k] for k in order],
        "checkpoint_report_indices": order,
        "latest_checkpoint_result": results[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(results),
        "validated_checkpoint_dir_names": [name for name, _, figures in whole if figures],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
