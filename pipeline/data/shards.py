"""Labelled pictures in shards: WebDataset tar files, and Parquet with encoded pictures or their URIs.

Shards of a split lie in its folder (``train/*.tar``) or are named after it beside each other (``train-0001.parquet``).
They are looked through once, and each picture gets a path by which it can be read at random (`pipeline.data.images`).

* Tar: members of one name belong together; the class is in ``<name>.cls``, in ``<name>.json`` (``label``, ``class`` or
  ``cls``), or else the folder that the picture lies in.
* Parquet: the class is in a column ``label``, ``class``, ``class_name``, ``cls`` or ``target``; numbers get the names that
  Hugging Face's metadata has for them.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline.data import folders, store
from pipeline.data.images import image_columns
from pipeline.data.listing import is_image_name
from pipeline.errors import UsageError

TAR, PARQUET = (".tar",), (".parquet", ".pq")
LABELS = ("label", "class", "class_name", "cls", "target")
"""Columns, and keys of a JSON member, that hold the class, in order of preference."""
THREADS = 8
LOOKED_AT = 1000
"""Files of a split's folder that are looked at for pictures of its own."""

Member = tuple[str, str]
"""Path and class name of a picture."""


def shard_files(root: str, split: str) -> list[str]:
    """Shards of ``split`` below ``root`` (a place), relative to it and sorted; none where it has pictures of its own."""
    inside = [f"{split}/{store.name_of(entry.place)}" for entry in folders.list_folder(store.join(root, split))]
    beside = [
        name
        for name in (store.name_of(entry.place) for entry in folders.list_folder(root))
        if name.startswith((f"{split}-", f"{split}_", f"{split}."))
    ]
    found = [path for path in (*inside, *beside) if path.lower().endswith((*TAR, *PARQUET))]
    return found if found and not _has_pictures(store.join(root, split)) else []


def _has_pictures(folder: str) -> bool:
    """Whether the folder of the split holds pictures: an archive that was left beside them is then no shard."""
    try:
        return any(is_image_name(entry.place) for entry in islice(folders.walk(folder), LOOKED_AT))
    except UsageError:  # no such folder
        return False


def read_shards(root: str, shards: Sequence[str]) -> list[Member]:
    """Every picture of the shards, in their order.

    Raises:
        UsageError: a shard cannot be read, or a picture has no class.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda shard: _read(root, shard), shards)
        quiet = None if len(shards) > THREADS else True
        return [member for members in tqdm(found, "shards", len(shards), disable=quiet) for member in members]


def _read(root: str, shard: str) -> list[Member]:
    try:
        with store.open_file(store.join(root, shard)) as raw:
            return _tar(raw, shard) if shard.lower().endswith(TAR) else _parquet(raw, shard)
    except (tarfile.TarError, EOFError, OSError, pa.ArrowException, store.ReadError) as error:
        raise UsageError(
            f"{store.join(root, shard)} cannot be read ({' '.join(str(error).split())[:200]}); mend or remove it"
        ) from error


def _tar(raw: Any, shard: str) -> list[Member]:
    images: dict[str, tuple[str, str]] = {}  # name of the member -> what it has in common with its companions, path
    classes: dict[str, str] = {}
    whole = raw.seek(0, io.SEEK_END)
    raw.seek(0)
    with tarfile.open(fileobj=raw, mode="r:") as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            key = f"{folder}/{name.partition('.')[0]}"
            suffix = name.partition(".")[2].lower()
            if not member.isreg():
                continue
            if member.offset_data + member.size > whole:  # which seeking over it does not notice
                raise tarfile.ReadError(f"it ends within {member.name}")
            if is_image_name(name):
                images[member.name] = key, f"{shard}#{member.offset_data}+{member.size}"
            elif suffix in ("cls", "json"):
                content = archive.extractfile(member)
                text = content.read().decode("utf-8", "replace").strip() if content else ""
                label = text if suffix == "cls" else _label_of(text)
                if label:
                    classes[key] = label
    plain = {key for name, (key, _) in images.items() if name.rpartition("/")[2].count(".") == 1}
    members = []
    for name, (key, path) in images.items():
        if key in plain and name.rpartition("/")[2].count(".") > 1:
            continue  # 0001.mask.png belongs to 0001.jpg, and is no example of its own
        label = classes.get(key) or PurePosixPath(key).parent.name
        if not label:
            raise UsageError(f"{shard}: the picture {key.lstrip('/')} has no class; add a member {key.lstrip('/')}.cls")
        members.append((path, label))
    return members


def _label_of(text: str) -> str | None:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    names = [name for name in LABELS if isinstance(value, dict) and value.get(name) is not None]
    return str(value[names[0]]) if names else None


def _parquet(raw: Any, shard: str) -> list[Member]:
    file = pq.ParquetFile(raw)
    schema = file.schema_arrow
    content, uri = image_columns(schema, None)
    label = next((name for name in LABELS if name in schema.names), None)
    if label is None or (content is None and uri is None):
        missing = "of classes (such as label)" if label is None else "of pictures or URIs"
        raise UsageError(f"{shard} has no column {missing} among {', '.join(schema.names)}; rename one")
    names = _class_names(schema, label)
    folder = shard.rpartition("/")[0]
    members = []
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=[label] if content or uri is None else [label, uri])
        places = None if content or uri is None else table.column(uri).to_pylist()
        for row, value in enumerate(table.column(label).to_pylist()):
            if value is None or (places is not None and not places[row]):
                raise UsageError(f"{shard}: row {row} of row group {group} has no {label if value is None else uri}")
            name = names[value] if names and isinstance(value, int) and 0 <= value < len(names) else str(value)
            if places is None:
                members.append((f"{shard}#{group}:{row}", name))
            else:
                place = places[row]
                own = store.is_remote(place) or place.startswith("/") or not folder
                members.append((place if own else f"{folder}/{place}", name))
    return members


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """Names of the classes as Hugging Face's `datasets` writes them into a Parquet file."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        return [str(name) for name in about["info"]["features"][label]["names"]]
    except (KeyError, TypeError, json.JSONDecodeError):
        return None
