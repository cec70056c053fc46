"""Files here and in object stores behind one set of functions, with retries where a network is between.

A *place* is an absolute local path, or a URI such as ``s3://bucket/key`` whose path is taken as it stands, unescaped.
Objects appear whole or not at all: a local file by rename, a remote one by a single PUT.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec

from pipeline.errors import UsageError, WorkError

ATTEMPTS = 8
"""Tries of one remote call beyond those of the client library, with growing pauses: about a minute and a half."""
MAX_BYTES = 1 << 30
"""Nothing larger is read into memory as one image."""

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")
_T = TypeVar("_T")


class ReadError(Exception):
    """One object cannot be read, for a reason that is its own (it is not there, it is not allowed, it is too large)."""


class StoreError(WorkError):
    """The store does not answer rightly although it was asked again and again."""


def place_of(text: str) -> str:
    """A local path, a ``file://`` URI or a remote URI as a place; relative paths count from the working directory."""
    match = _SCHEME.match(text)
    if match is None:
        return _absolute(str(Path(text).expanduser()))
    scheme = match[1].lower()
    if scheme in ("file", "local"):
        return _absolute(text[match.end() :])
    return f"{scheme}://{text[match.end() :].rstrip('/')}"


def _absolute(path: str) -> str:
    # Not `Path.resolve`, which would replace links: rows are called what the user calls their images.
    return os.path.normpath(Path.cwd() / path)


def is_remote(place: str) -> bool:
    return _SCHEME.match(place) is not None


def join(place: str, *names: str) -> str:
    return "/".join([place.rstrip("/"), *names])


def name_of(place: str) -> str:
    return place.rsplit("/", 1)[-1]


def filesystem(place: str) -> tuple[Any, str]:
    """The fsspec file system of a remote place and the path within it.

    Raises:
        UsageError: the scheme is unknown, or what speaks it is not installed.
    """
    match = _SCHEME.match(place)
    assert match is not None, place
    scheme, path = match[1], place[match.end() :]
    options: dict[str, Any] = {}
    if scheme == "s3":
        retries = {"max_attempts": 4, "mode": "standard"}
        client = {"connect_timeout": 10, "read_timeout": 30, "retries": retries, "max_pool_connections": 64}
        options = {"use_listings_cache": False, "max_concurrency": 1, "config_kwargs": client}
    try:
        return fsspec.filesystem(scheme, **options), path
    except (ValueError, ImportError) as error:
        raise UsageError(f"{place}: cannot use {scheme}:// ({error}); give a local path or an s3:// URI") from error


def retried(place: str, call: Callable[[], _T]) -> _T:
    """The value of a remote call, tried again while the failure may pass.

    Raises:
        ReadError: the object is not there or not allowed.
        StoreError: it failed `ATTEMPTS` times.
    """
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except FileNotFoundError as error:
            raise ReadError("no such object") from error
        except PermissionError as error:
            raise ReadError("access denied") from error
        except IsADirectoryError as error:
            raise ReadError("it is a folder") from error
        except Exception as error:  # clients of stores raise whatever their network library raises
            if attempt == ATTEMPTS - 1:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise StoreError(
                    f"{place}: the store failed {ATTEMPTS} times ({reason}); run the command again"
                ) from error
            time.sleep(min(30.0, 0.25 * 2**attempt) * (0.5 + random.random()))
    raise AssertionError("unreachable")


def read_bytes(place: str, *, most: int = MAX_BYTES) -> bytes:
    """The content of an object.

    Raises:
        ReadError: it cannot be read.
        StoreError: a remote store does not answer.
    """
    if is_remote(place):
        data = _read_remote(place, most)
        if len(data) > most:
            raise ReadError(f"larger than the limit of {most} bytes")
        return data
    try:
        # A FIFO or a device would block for ever: opened without waiting, looked at, and refused.
        descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ReadError(getattr(error, "strerror", None) or str(error)) from error
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ReadError("not a regular file")
        if about.st_size > most:
            raise ReadError(f"{about.st_size} bytes, the limit is {most}")
        try:
            return file.read()
        except OSError as error:
            raise ReadError(error.strerror or str(error)) from error


def _read_remote(place: str, most: int) -> bytes:
    """At most one byte more than ``most``, in one request: asking for the size first would double the requests."""
    files, path = filesystem(place)

    def call() -> bytes:
        try:
            return files.cat_file(path, start=0, end=most + 1)
        except OSError as error:
            if "InvalidRange" in str(error) or "range is not satisfiable" in str(error):
                return b""  # a range of an empty object
            raise

    return retried(place, call)


def read_range(place: str, start: int, size: int) -> bytes:
    """``size`` bytes of an object from byte ``start``.

    Raises:
        ReadError: it cannot be read, or is shorter.
        StoreError: a remote store does not answer.
    """
    if is_remote(place):
        files, path = filesystem(place)
        data = retried(place, lambda: files.cat_file(path, start=start, end=start + size))
    else:
        try:
            with Path(place).open("rb") as file:
                file.seek(start)
                data = file.read(size)
        except OSError as error:
            raise ReadError(error.strerror or str(error)) from error
    if len(data) != size:
        raise ReadError(f"it ends before byte {start + size}")
    return data


def read_end(place: str, size: int) -> bytes:
    """The last ``size`` bytes of an object, or all of it where it is shorter; in one request.

    Raises:
        ReadError: it cannot be read.
        StoreError: a remote store does not answer.
    """
    if is_remote(place):
        files, path = filesystem(place)
        return retried(place, lambda: files.cat_file(path, start=-size))
    try:
        with Path(place).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read()
    except OSError as error:
        raise ReadError(error.strerror or str(error)) from error


def open_file(place: str) -> Any:
    """An open, seekable binary file."""
    if is_remote(place):
        files, path = filesystem(place)
        return retried(place, lambda: files.open(path, "rb", block_size=8 << 20))
    try:
        return Path(place).open("rb")
    except OSError as error:
        raise ReadError(error.strerror or str(error)) from error


def write_bytes(place: str, data: bytes, *, temporary: str | None = None) -> None:
    """Make an object appear whole at ``place``, over an older one; ``temporary`` is a folder for the part file.

    Raises:
        StoreError: it cannot be written.
    """
    if is_remote(place):
        _put(place, data)
        return
    with writing(place, temporary=temporary) as file:
        file.write(data)


@contextlib.contextmanager
def writing(place: str, *, temporary: str | None = None) -> Iterator[BinaryIO]:
    """A file that appears whole at ``place``, over an older one, when the block ends well; ``temporary`` as above.

    Raises:
        StoreError: it cannot be written.
    """
    if is_remote(place):
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            data = file.read()
        _put(place, data)
        return
    target = Path(place)
    part = Path(temporary or target.parent) / f".{target.name}.{uuid.uuid4().hex}.part"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the data does
        part.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the folder may be none
            part.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise StoreError(
            f"{place}: cannot be written ({error.strerror or error}); free space or fix the permissions"
        ) from error


def _put(place: str, data: bytes) -> None:
    files, path = filesystem(place)
    try:
        retried(place, lambda: files.pipe_file(path, data, chunksize=2 << 30))
    except ReadError as error:
        raise StoreError(f"{place}: cannot be written ({error}); check the bucket and its permissions") from error


def read_optional(place: str) -> bytes | None:
    """The content of an object, None when there is none."""
    if not is_remote(place):
        try:
            return Path(place).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"{place}: cannot be read ({error.strerror or error}); fix the permissions") from error
    files, path = filesystem(place)

    def call() -> bytes | None:
        try:
            return files.cat_file(path)
        except FileNotFoundError:
            return None

    try:
        return retried(place, call)
    except ReadError as error:
        raise StoreError(f"{place}: cannot be read ({error}); check the bucket and its permissions") from error


def exists(place: str) -> bool:
    if not is_remote(place):
        return Path(place).exists()
    files, path = filesystem(place)
    return retried(place, lambda: files.exists(path))


def delete(place: str) -> None:
    """Remove an object; one that is gone already is fine."""
    if is_remote(place):
        files, path = filesystem(place)

        def call() -> None:
            try:
                files.rm_file(path)
            except FileNotFoundError:
                return

        retried(place, call)
    else:
        Path(place).unlink(missing_ok=True)


def move(source: str, target: str) -> None:
    """Move an object; when another process has moved it already, nothing is left to do."""
    if is_remote(source):
        data = read_optional(source)
        if data is not None:
            write_bytes(target, data)
            delete(source)
        return
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    try:
        Path(source).replace(target)
    except FileNotFoundError:
        return
