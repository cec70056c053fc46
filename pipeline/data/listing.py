"""Which files of a folder are pictures.

What counts: regular files whose name ends, in any case, in one of `IMAGE_SUFFIXES`, at any depth, hidden ones and links
included.  A link that leads nowhere counts too, so that it becomes an error row instead of disappearing.  Other files
(another suffix, pipes, devices) are counted as skipped.  Where a folder is the root of a data set (it has a folder
``train``, ``val`` or ``test``), its folder ``masks`` is left out without being counted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UsageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLITS = ("train", "val", "test")


class Listing(NamedTuple):
    """The pictures of a folder."""

    paths: list[str]
    """Relative to the folder, with ``/``; sorted by bytes.  Names not in UTF-8 hold surrogates (`os.fsdecode`)."""
    skipped: int
    """How many files are there that do not count as pictures."""


def is_image_name(name: str) -> bool:
    """Whether a file of this name counts as a picture.  The name alone says so; the content then decides the format."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def list_images(root: str | os.PathLike[str]) -> Listing:
    """All pictures below a folder.  Linked folders are followed, though never back into a folder that they lie in."""
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"no folder of images at {root}; name an existing folder")
    is_data_set = any((root / split).is_dir() for split in SPLITS)
    paths: list[str] = []
    skipped = 0
    for path, counts in _walk(str(root), "", (), skip_masks=is_data_set):
        if counts:
            paths.append(path)
        else:
            skipped += 1
    return Listing(sorted(paths, key=os.fsencode), skipped)


def _walk(
    folder: str, prefix: str, above: tuple[tuple[int, int], ...], *, skip_masks: bool = False
) -> Iterator[tuple[str, bool]]:
    """Yield (relative path, counts as a picture) of every file below ``folder``.  above: the folders around it."""
    try:
        here = Path(folder).stat()
        if (here.st_dev, here.st_ino) in above:  # a link that leads back up
            return
        with os.scandir(folder) as scan:
            entries = list(scan)
    except OSError as error:
        raise UsageError(
            f"cannot list the folder {folder} ({error.strerror}); make it readable or move it away"
        ) from error
    above = (*above, (here.st_dev, here.st_ino))
    for entry in entries:
        if _is_folder(entry):
            if not (skip_masks and entry.name == "masks"):
                yield from _walk(entry.path, f"{prefix}{entry.name}/", above)
        else:
            yield f"{prefix}{entry.name}", is_image_name(entry.name) and _is_file_or_lost_link(entry)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that is closed to us
        return False


def _is_file_or_lost_link(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISREG(entry.stat().st_mode) if entry.is_symlink() else entry.is_file()
    except OSError:
        return True
