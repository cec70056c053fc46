"""What lies in a folder, here or in an object store: its objects with size and stamp, in an order that only names decide."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.store import ReadError, filesystem, is_remote, name_of, retried
from pipeline.errors import UsageError

NOT_REGULAR = -2


class Entry(NamedTuple):
    """One object of a listing."""

    place: str
    size: int
    """In bytes; -1 when it could not be found out, `NOT_REGULAR` for a pipe or a device."""
    stamp: str
    """Changes when the content does: the entity tag of an object, the time of the last change of a local file."""


def list_folder(place: str) -> list[Entry]:
    """The objects that lie directly in a folder, in order of name; nothing when there is no such folder."""
    if is_remote(place):
        return sorted(entry for entry in _list_remote(place + "/", delimiter="/") if name_of(entry.place))
    try:
        with os.scandir(place) as found:
            return sorted(_local_entry(entry.path) for entry in found if entry.is_file())
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_after(folder: str, name: str) -> Iterator[Entry]:
    """The objects that lie directly in a remote folder and whose names come after ``name``, in order of name."""
    return (entry for entry in _list_remote(folder + "/", delimiter="/", after=name) if name_of(entry.place) > name)


def look_at(place: str) -> Entry:
    """Size and stamp of a remote object that is known by its name; without them when it cannot be read.

    Raises:
        StoreError: the store does not answer.
    """
    files, path = filesystem(place)
    bucket, _, key = path.partition("/")
    try:
        if place.startswith("s3:"):
            about = retried(place, lambda: files.call_s3("head_object", Bucket=bucket, Key=key))
            return Entry(place, about["ContentLength"], about["ETag"].strip('"'))
        about = retried(place, lambda: files.info(path))
    except ReadError:
        return Entry(place, -1, "")
    return Entry(place, int(about.get("size") or 0), _stamp(about))


def walk(root: str, *, enter: Callable[[str], bool] = lambda _folder: True) -> Iterator[Entry]:
    """All objects below a folder in an order that only their names decide; memory is that of the largest folder.

    ``enter(folder)`` says whether a folder, given as a place, is walked into.  Links to folders are followed, but never
    into a folder that is being walked already.
    """
    if is_remote(root):
        yield from (entry for entry in _list_remote(root + "/") if _entered(root, entry.place, enter))
        return
    yield from _walk_local(root, enter, frozenset())


def _entered(root: str, place: str, enter: Callable[[str], bool]) -> bool:
    folder = place.rsplit("/", 1)[0]
    while len(folder) > len(root):
        if not enter(folder):
            return False
        folder = folder.rsplit("/", 1)[0]
    return True


def _walk_local(folder: str, enter: Callable[[str], bool], above: frozenset[tuple[int, int]]) -> Iterator[Entry]:
    try:
        about = Path(folder).stat()
        if (about.st_dev, about.st_ino) in above:  # a link that leads back up
            return
        with os.scandir(folder) as found:
            # Names only: a folder of a million files costs its names, not a million `DirEntry` objects.
            entries = sorted((entry.name, _is_folder(entry)) for entry in found)
    except OSError as error:
        raise UsageError(
            f"cannot list the folder {folder} ({error.strerror}); make it readable or move it away"
        ) from error
    above = above | {(about.st_dev, about.st_ino)}
    for name, is_folder in entries:
        path = f"{folder.rstrip('/')}/{name}"
        if not is_folder:
            yield _local_entry(path)
        elif enter(path):
            yield from _walk_local(path, enter, above)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that is closed to us
        return False


def _local_entry(path: str) -> Entry:
    try:
        about = os.stat(path)  # noqa: PTH116 - a `Path` for each of 10^8 names would cost more than the call
    except OSError:  # a link into nothing, or a file that vanished: a row will say so
        return Entry(path, -1, "")
    return Entry(path, about.st_size if stat.S_ISREG(about.st_mode) else NOT_REGULAR, str(about.st_mtime_ns))


def _list_remote(prefix: str, delimiter: str = "", after: str = "") -> Iterator[Entry]:
    """Objects whose place begins with ``prefix``, in order of name, a page at a time where the store is S3.

    ``after``: what follows the prefix in a name; S3 begins behind that name, other stores with the first.
    """
    files, path = filesystem(prefix)
    scheme = prefix.split("://", 1)[0]
    if scheme != "s3":
        found = retried(prefix, lambda: files.find(path.rstrip("/"), maxdepth=1 if delimiter else None, detail=True))
        for name in sorted(found):
            yield Entry(f"{scheme}://{name.lstrip('/')}", int(found[name].get("size") or 0), _stamp(found[name]))
        return
    bucket, _, key = path.partition("/")
    token: dict[str, str] = {"StartAfter": key + after} if after else {}
    while True:
        page = retried(
            prefix,
            lambda token=token: files.call_s3(
                "list_objects_v2", Bucket=bucket, Prefix=key, Delimiter=delimiter, **token
            ),
        )
        for item in page.get("Contents", ()):
            if not item["Key"].endswith("/"):  # consoles make such empty objects to show a folder
                yield Entry(f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"].strip('"'))
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def _stamp(about: dict[str, Any]) -> str:
    return str(about.get("ETag") or about.get("etag") or about.get("mtime") or about.get("created") or "")
