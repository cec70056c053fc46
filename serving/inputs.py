"""What there is to score: a folder, a glob, one file, a list, Parquet or WebDataset, here or in an object store.

Listing yields `Entry` by `Entry` in an order that depends on nothing but names, and opens nothing: images and containers
are opened by whoever scores them (`serving.sources`).
"""

from __future__ import annotations

import csv
import io
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from fsspec.utils import glob_translate

from pipeline.data import folders, store
from pipeline.data.folders import Entry
from pipeline.data.images import URI_NAMES
from pipeline.data.listing import SPLITS, is_image_name
from pipeline.errors import UsageError
from serving.lookup import looked_up
from serving.roots import within

Kind = Literal["image", "parquet", "tar"]

PARQUET_SUFFIXES = (".parquet", ".pq")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
LIST_SUFFIXES = (".txt", ".csv")


@dataclass
class Inputs:
    """An input, understood; `entries` goes through it once, and the counts are whole when it is through."""

    place: str
    shape: Literal["folder", "glob", "file", "list"]
    exclude: str | None = None
    """A folder that is left out: the output, when it lies within the input (all that is ours, when it is the input)."""
    roots: Sequence[str] = ()
    """With any: places that a list names outside them are not looked up."""
    others: Counter[str] = field(default_factory=Counter)
    """Files that are neither images nor, without images, containers, by suffix."""

    def entries(self) -> Iterator[tuple[Kind, Entry]]:
        """The inputs with their kinds.  Containers count only where there is no image at all."""
        self.others.clear()
        if self.shape == "list":
            for entry in _list_entries(self.place, self.roots):
                yield "image", entry
            return
        if self.shape == "file":
            entry = _single(self.place)
            yield _kind(self.place) or "image", entry
            return
        containers: list[tuple[Kind, Entry]] = []
        images = 0
        for entry in self._found():
            kind = _kind(entry.place) if entry.size != folders.NOT_REGULAR else None
            if kind == "image":
                images += 1
                yield kind, entry
            elif kind is not None and not images:
                containers.append((kind, entry))
            else:
                self.others[_suffix(entry.place)] += 1
        if images:
            self.others.update(_suffix(entry.place) for _, entry in containers)
        else:
            yield from containers

    def _found(self) -> Iterator[Entry]:
        if self.shape == "glob":
            root = _fixed_part(self.place)
            pattern = _compiled(self.place)
            found = folders.walk(root, enter=self._enter) if store.is_remote(root) or Path(root).is_dir() else iter(())
            return (entry for entry in found if pattern.match(entry.place))
        root = self.place
        skipped = store.join(root, "masks") if _is_dataset_root(root) else None
        return folders.walk(root, enter=lambda folder: folder != skipped and self._enter(folder))

    def _enter(self, folder: str) -> bool:
        if self.exclude is None:
            return True
        # Where images and scores share a folder, what we write beside the scores begins with an underscore.
        return folder != self.exclude and not folder.startswith(store.join(self.exclude, "_"))


def open_inputs(text: str, *, exclude: str | None = None, roots: Sequence[str] = ()) -> Inputs:
    """Understand ``--input``.

    ``roots``: with any, what a list names outside them is not looked up; whoever reads it refuses.

    Raises:
        UsageError: there is nothing there.
    """
    place = store.place_of(text)
    if store.is_remote(place):
        if not _is_glob(place) and store.exists(place) and _remote_file(place):
            return Inputs(place, _file_shape(place), roots=roots)
        if _is_glob(place):
            return Inputs(place, "glob", exclude)
        if next(folders.walk(place), None) is None:
            raise UsageError(
                f"--input {text}: no such object, and nothing below it; give a folder, a file, a list or a glob"
            )
        return Inputs(place, "folder", exclude)
    try:
        found = Path(place).stat()
    except (FileNotFoundError, NotADirectoryError):
        found = None
    except (OSError, ValueError) as error:  # a name that is too long, a folder that is closed to us, a NUL
        raise UsageError(
            f"--input {text[:200]}: {getattr(error, 'strerror', None) or error}; look at the path"
        ) from error
    if found is not None and stat.S_ISDIR(found.st_mode):
        return Inputs(place, "folder", exclude)
    if found is not None:
        return Inputs(place, _file_shape(place), roots=roots)
    if _is_glob(place):
        return Inputs(place, "glob", exclude)
    raise UsageError(f"--input {text}: no such file or folder; give a folder, a file, a list, a glob or an s3:// URI")


def _suffix(place: str) -> str:
    return PurePosixPath(store.name_of(place)).suffix.lower()


def _kind(place: str) -> Kind | None:
    name = store.name_of(place).lower()
    if is_image_name(name):
        return "image"
    if name.endswith(PARQUET_SUFFIXES):
        return "parquet"
    return "tar" if name.endswith(TAR_SUFFIXES) else None


def _file_shape(place: str) -> Literal["file", "list"]:
    return "list" if _suffix(place) in LIST_SUFFIXES else "file"


def _remote_file(place: str) -> bool:
    files, path = store.filesystem(place)
    return store.retried(place, lambda: files.isfile(path))


def _single(place: str) -> Entry:
    if not store.is_remote(place):
        about = Path(place).stat()
        return Entry(place, about.st_size, str(about.st_mtime_ns))
    folder = place.rsplit("/", 1)[0]
    return next(entry for entry in folders.list_folder(folder) if entry.place == place)


def _is_dataset_root(root: str) -> bool:
    if store.is_remote(root):
        return any(next(folders.walk(store.join(root, split)), None) is not None for split in SPLITS)
    return any(Path(root, split).is_dir() for split in SPLITS)


def _is_glob(place: str) -> bool:
    return any(character in place for character in "*?[")


def _fixed_part(pattern: str) -> str:
    """The folder before the first part of the pattern that holds a wildcard."""
    parts = pattern.split("/")
    first = next(k for k, part in enumerate(parts) if _is_glob(part))
    return "/".join(parts[:first]) or "/"


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(glob_translate(pattern))
    except (ValueError, re.error) as error:
        raise UsageError(f"--input {pattern}: no glob ({error}); '**' stands for whole folders") from error


def _list_entries(place: str, roots: Sequence[str]) -> Iterator[Entry]:
    """The entries of a list file, one for each line, in its order; relative paths count from the list's folder."""
    folder = place.rsplit("/", 1)[0]

    def places() -> Iterator[str]:
        for name in _list_names(place):
            found = store.place_of(name) if store.is_remote(name) or name.startswith("/") else store.join(folder, name)
            yield found if store.is_remote(found) else os.path.normpath(found)

    return looked_up(places(), allowed=lambda found: not roots or within(found, roots))


def _list_names(place: str) -> Iterator[str]:
    with store.open_file(place) as raw:
        # surrogateescape: names on a file system need not be UTF-8.
        text = io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape", newline="")
        if _suffix(place) == ".txt":
            for line in text:
                if name := line.rstrip("\r\n").lstrip("\ufeff"):
                    yield name
            return
        rows = csv.reader(text)
        column = 0
        for number, row in enumerate(rows):
            if not number:
                header = [name.strip().lower().lstrip("\ufeff") for name in row]
                named = [header.index(name) for name in URI_NAMES if name in header]
                if named:
                    column = named[0]
                    continue
            if len(row) > column and row[column]:
                yield row[column]
