"""The folder of a training run, here or in an object store: whose it is, and the bundle that ends up in it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs

from pipeline.bundle import SAMPLES_FILE
from pipeline.errors import UsageError
from pipeline.training import TrainingPlan, complete_bundle

PLAN_FILE = "plan.json"
MAY_CHANGE = ("steps", "budget", "threads", "checkpoint_seconds", "validate_seconds", "validate_steps", "precision")
"""Fields of a plan that a run may be continued with another value of."""
ELSEWHERE = ("paths", "labels", "data")
"""What the listing's hash stands for; the same pictures may lie somewhere else by now."""
WEIGHTS = "weights"
"""Beginning of the name of the classifier's own weights in a run's folder."""


def open_storage(out: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of a path or URI, and the path in it."""
    try:
        if "://" in out:
            return pyarrow.fs.FileSystem.from_uri(out)
        return pyarrow.fs.LocalFileSystem(), str(Path(out).resolve())
    except (OSError, ValueError) as error:
        raise UsageError(f"--out {out}: {error}; give a folder, or a URI such as s3://bucket/run") from error


def claim_run(filesystem: pyarrow.fs.FileSystem, root: str, fields: dict[str, Any]) -> None:
    """Record the plan in the run's folder; a run that is continued must have the same one.

    Raises:
        UsageError: the folder belongs to a run with other settings, or cannot be written.
    """
    listing = listing_hash(fields["paths"], fields["labels"])
    kept = {k: v for k, v in fields.items() if k not in (*ELSEWHERE, *MAY_CHANGE)} | {"listing": listing}
    mine = json.loads(json.dumps(kept))
    path = f"{root}/{PLAN_FILE}"
    try:
        if filesystem.get_file_info(path).type == pyarrow.fs.FileType.File:
            with filesystem.open_input_stream(path) as stream:
                theirs = read_plan(stream.read(), path)
            changed = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
            if changed:
                key = changed[0]
                raise UsageError(
                    f"--out {root} holds a run with another {key} ({str(theirs.get(key))[:60]} there, "
                    f"{str(mine.get(key))[:60]} now); give another --out, or the old settings to go on"
                )
            return
        filesystem.create_dir(root, recursive=True)
        write_whole(filesystem, path, (json.dumps(mine, indent=1) + "\n").encode())
    except OSError as error:
        raise UsageError(f"--out {root} cannot be written ({error}); give a writable folder") from error


def read_plan(data: bytes, path: str) -> dict[str, Any]:
    """What `claim_run` recorded.

    Raises:
        UsageError: it is no such record.
    """
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is damaged; delete it, and the same command goes on with its checkpoints")
    return found


def keep_weights(weights: str, filesystem: pyarrow.fs.FileSystem, root: str, out: str) -> tuple[str, str]:
    """Copy the weights file of this machine into the run's folder, where all workers find it and every resumed run will.

    Returns its place there, and what it is known by: its content, for the file itself may be called otherwise next time.
    A URI is its own place and name.
    """
    if "://" in weights:
        return weights, weights
    with Path(weights).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = f"{WEIGHTS}-{digest[:16]}{Path(weights).suffix}"
    there = filesystem.get_file_info(f"{root}/{name}")
    if there.type != pyarrow.fs.FileType.File or there.size != Path(weights).stat().st_size:
        filesystem.create_dir(root, recursive=True)
        upload(Path(weights), filesystem, f"{root}/{name}")
    return f"{out.rstrip('/')}/{name}", f"sha256:{digest}"


def listing_hash(paths: Sequence[str], labels: Sequence[int]) -> str:
    """SHA-256 of ``[paths, labels]`` as JSON, written piece by piece: a large listing has no room for itself once more."""
    digest = hashlib.sha256(b"[")
    for first, values in ((True, paths), (False, labels)):
        digest.update(b"[" if first else b", [")
        for k, value in enumerate(values):
            digest.update(f"{', ' if k else ''}{json.dumps(value)}".encode())
        digest.update(b"]")
    digest.update(b"]")
    return digest.hexdigest()


def publish(checkpoint: Path, plan: TrainingPlan, filesystem: pyarrow.fs.FileSystem, root: str) -> None:
    """Copy the bundle of a checkpoint to where the run's readers expect it, whole."""
    target = f"{root}/bundle"
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        shutil.copytree(checkpoint / "bundle", bundle)
        if not (bundle / SAMPLES_FILE).is_file():  # one that was validated on the way
            complete_bundle(bundle, plan)
        if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
            partial = Path(f"{root}/.bundle")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(bundle, partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.replace(target)
        else:
            # Object stores have no rename of folders; model.json goes last, and without it a folder is no bundle.
            if filesystem.get_file_info(f"{target}/model.json").type == pyarrow.fs.FileType.File:
                filesystem.delete_file(f"{target}/model.json")
            filesystem.create_dir(target, recursive=True)
            for file in sorted(bundle.iterdir(), key=lambda file: file.name == "model.json"):
                upload(file, filesystem, f"{target}/{file.name}")


def write_whole(filesystem: pyarrow.fs.FileSystem, path: str, data: bytes) -> None:
    """Make a file of ``data`` appear whole at ``path``."""
    _write(filesystem, path, [data])


def upload(file: Path, filesystem: pyarrow.fs.FileSystem, target: str) -> None:
    """Copy ``file`` to ``target``, where it appears whole."""
    with file.open("rb") as source:
        _write(filesystem, target, iter(lambda: source.read(1 << 20), b""))


def _write(filesystem: pyarrow.fs.FileSystem, path: str, parts: Iterable[bytes]) -> None:
    """By rename here, while objects of a store always appear whole."""
    local = isinstance(filesystem, pyarrow.fs.LocalFileSystem)
    with filesystem.open_output_stream(f"{path}.part" if local else path) as stream:
        for part in parts:
            stream.write(part)
    if local:
        filesystem.move(f"{path}.part", path)
