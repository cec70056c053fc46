"""The folder of a training run, here or in an object store: whose it is, and the bundle that ends up in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs

from pipeline.bundle import SAMPLES_FILE
from pipeline.data import store
from pipeline.errors import UsageError
from pipeline.training import TrainingPlan, complete_bundle
from pipeline.weights import fetched

PLAN_FILE = "plan.json"
MAY_CHANGE = ("steps", "budget", "threads", "checkpoint_seconds", "validate_seconds", "validate_steps", "precision")
"""Fields of a plan that a run may be continued with another value of."""
ELSEWHERE = ("paths", "labels", "data")
"""What the listing's hash stands for; the same pictures may lie somewhere else by now."""
WEIGHTS = "weights"
"""Beginning of the name of the classifier's own weights in a run's folder."""


def open_storage(out: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of a path or URI, and the path in it."""
    odd = [mark for mark in "?%@" if mark in out] if "://" in out else []
    if odd:  # the libraries that read and write a run take these for different things
        raise UsageError(
            f"--out {out}: a URI of a run holds no {odd[0]!r}; give s3://bucket/run, and the store's address and keys in "
            "AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
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


@contextlib.contextmanager
def weights_here(weights: str) -> Iterator[tuple[Path, str]]:
    """The file of a classifier's weights on this machine, fetched where ``weights`` is a URI, and what it is known by: its
    content, for the file may be called otherwise or be gone when the run goes on.

    Raises:
        UsageError: it cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(weights)
        if store.is_remote(weights):
            path = fetched(store.place_of(weights), Path(folder))
        with path.open("rb") as file:
            yield path, f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def keep_weights(file: Path, known_as: str, filesystem: pyarrow.fs.FileSystem, root: str, out: str) -> str:
    """Copy a file of weights into the run's folder, where all workers find it; returns its place there.

    ``known_as``: what `weights_here` says of it.
    """
    name = f"{WEIGHTS}-{known_as.removeprefix('sha256:')[:16]}{file.suffix}"
    there = filesystem.get_file_info(f"{root}/{name}")
    if there.type != pyarrow.fs.FileType.File or there.size != file.stat().st_size:
        upload(file, filesystem, f"{root}/{name}")
    return f"{out.rstrip('/')}/{name}"


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
            filesystem.create_dir(target, recursive=True)
            if filesystem.get_file_info(f"{target}/model.json").type == pyarrow.fs.FileType.File:
                write_whole(
                    filesystem, f"{target}/model.json", b""
                )  # of the bundle before; who may write may not delete
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
