"""Ray Train's list of a run's checkpoints, made anew where it does not hold.

Ray writes the list in place: a driver that is killed in the middle leaves half of one, with which Ray refuses to begin
again, whole as the checkpoints are.  So it does when a checkpoint of the list is gone.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray

from pipeline.run_folder import write_whole
from pipeline.snapshots import FOLDER, file_name
from pipeline.validation import LEAST, SCORE

INDEX_FILE = "checkpoint_manager_snapshot.json"
"""Ray's name for the list."""


def mend_index(filesystem: pyarrow.fs.FileSystem, folder: str) -> str | None:
    """Make the list of the run's checkpoints in ``folder`` hold again where it is torn or names one that is gone.

    Returns what was done, for the user; none where the list holds, or there is neither list nor checkpoint.  The new list
    holds the newest checkpoint that is whole; without one there is no list, and the run begins anew.

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
    for name in sorted(there, reverse=True):
        step = whole_step(filesystem, folder, name)
        if step is not None:
            write_whole(filesystem, path, json.dumps(_index_of(name, step)).encode())
            return f"{path} {trouble}; going on from {name}, step {step}"
    if exists:
        filesystem.delete_file(path)
    return f"{path} {trouble}, and no checkpoint beside it is whole; beginning anew"


def whole_step(filesystem: pyarrow.fs.FileSystem, folder: str, name: str) -> int | None:
    """The step of a checkpoint all of whose files can be read; none for one that was cut off while it was copied, or whose
    snapshots of the classifier, which lie beside ``folder``, are gone.

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
        try:
            state = torch.load(Path(scratch) / "state.pt", map_location="cpu", weights_only=True)
            rows = (Path(scratch) / "log.csv").read_text(encoding="utf-8").splitlines()
            if (Path(scratch) / "bundle").is_dir():
                load_bundle(Path(scratch) / "bundle")
        except Exception:  # what torch's unpickler says of damage has no base of its own
            return None
        beside = f"{folder.rpartition('/')[0]}/{FOLDER}"
        needed = [] if state["population"] else [f"{beside}/{file_name(taken)}" for taken in state["snapshots"]]
        if any(info.type != pyarrow.fs.FileType.File for info in filesystem.get_file_info(needed)):
            return None
        return int(state["step"]) if len(rows) == int(state["step"]) + 1 else None


def _index_of(name: str, step: int) -> dict[str, Any]:
    """Ray's list with one checkpoint in it (`ray.train.v2`'s `_CheckpointManagerState`)."""
    result = {"version": 0, "checkpoint_dir_name": name, "metrics": {"step": step, "final": 0, SCORE: LEAST}}
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": [result],
        "checkpoint_report_indices": [0],
        "latest_checkpoint_result": result,
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": 1,
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
