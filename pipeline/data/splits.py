"""The labelled pictures of a data set: folders by class or shards, on this machine or in an object store."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data import folders, store
from pipeline.data.listing import is_image_name, list_images
from pipeline.data.shards import read_shards, shard_files
from pipeline.errors import UsageError


@dataclass(frozen=True)
class Split:
    """The labelled pictures of ``root/<split>/<class>/``."""

    root: str
    """A local folder or a remote URI."""
    paths: list[str]
    """As `pipeline.data.images` reads them: ``train/cat/1.jpg``.  Class after class; files sorted within each."""
    labels: list[int]
    """Index into ``classes``, one per path."""
    classes: list[str]


def read_split(
    root: str | os.PathLike[str],
    split: str,
    *,
    classes: Sequence[str] | None = None,
    per_class: int | None = None,
    seed: int = 0,
) -> Split:
    """The labelled pictures of one split: ``<split>/<class>/*``, or shards (`pipeline.data.shards`), here or in a store.

    classes: the class order of the training set, which the labels then follow; a class without a picture in this split
    is fine, an unknown class is not.  By default the folders' names, sorted; a folder that begins with a dot is none.
    per_class: at most so many pictures of each class, chosen by ``seed``; a smaller choice lies inside every larger
    one, and that of one class does not depend on which others there are.
    """
    place = store.place_of(str(root))
    folder = store.join(place, split)
    try:
        found, members = _listed(place, split)
    except store.ReadError as error:
        raise UsageError(f"{folder} cannot be listed ({error}); check the address and its permissions") from error
    if not any(members.values()):
        raise UsageError(f"no images in {folder}; labelled images are expected as {folder}/<class>/<image>")
    if classes is None:
        if empty := [name for name in found if not members[name]]:
            raise UsageError(f"no images in the class folder {folder}/{empty[0]}; add some or remove it")
        classes = found
    elif unknown := [name for name in found if name not in set(classes)]:
        raise UsageError(
            f"the class folder {folder}/{unknown[0]} is none of the {len(classes)} known classes ({_some(classes)}); "
            "rename or remove it, or train with it"
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        chosen = _choose(members.get(name, []), per_class, name, seed)
        paths += chosen
        labels += [label] * len(chosen)
    return Split(place, paths, labels, list(classes))


def _listed(place: str, split: str) -> tuple[list[str], dict[str, list[str]]]:
    """Classes in their order, and the paths of each."""
    if shards := shard_files(place, split):
        members: dict[str, list[str]] = {}
        for path, name in read_shards(place, shards):
            members.setdefault(name, []).append(path)
        # numbered classes in the order of their numbers
        found = sorted(members, key=int) if all(name.isdecimal() for name in members) else sorted(members)
    elif store.is_remote(place):
        members = _remote_members(place, split)
        found = sorted(members)
    else:
        if not Path(place, split).is_dir():
            raise UsageError(
                f"no folder {split}/ in {place}, and no shards {split}-*; labelled images are expected as "
                f"{place}/{split}/<class>/<image>"
            )
        found = sorted(
            entry.name
            for entry in os.scandir(store.join(place, split))
            if entry.is_dir() and not entry.name.startswith(".")
        )
        members = {
            name: [f"{split}/{name}/{path}" for path in list_images(f"{place}/{split}/{name}").paths] for name in found
        }
    return found, members


def _remote_members(place: str, split: str) -> dict[str, list[str]]:
    """Class -> paths of the objects ``<split>/<class>/...`` that are pictures."""
    members: dict[str, list[str]] = {}
    for entry in folders.walk(store.join(place, split)):
        path = entry.place[len(place) + 1 :]
        parts = path.split("/")
        if len(parts) > 2 and not parts[1].startswith(".") and is_image_name(path):
            members.setdefault(parts[1], []).append(path)
    return members


def _choose(members: list[str], count: int | None, name: str, seed: int) -> list[str]:
    if count is None or len(members) <= count:
        return members
    order = np.random.default_rng([seed, zlib.crc32(os.fsencode(name))]).permutation(len(members))
    return [members[i] for i in sorted(order[:count])]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
