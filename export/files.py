"""Writing artefacts whole or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_local(arguments: Any, *names: str) -> None:
    """Make sure that no flag among ``names`` is a URI, which would become a local folder called ``s3:``.

    Raises:
        UsageError: one is; names it.
    """
    for name in names:
        value = getattr(arguments, name, None)
        if value is not None and "://" in value:
            raise UsageError(
                f"--{name.replace('_', '-')} {value}: an export reads and writes local files; copy to and from the store "
                "with its own tool, such as 'aws s3 cp --recursive'"
            )


@contextmanager
def whole(path: str | Path, flag: str = "--out") -> Iterator[Path]:
    """A path beside ``path`` to write to: it takes the name ``path`` when the block ends well, and is removed if not.

    Raises:
        UsageError: the target cannot be written or the disk is full; names ``flag``.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        if path.is_dir():
            raise UsageError(f"{flag} {path} is a folder; give the name of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}; give {flag} a writable place with enough room"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def ensure_writable(path: str | Path, flag: str = "--out") -> None:
    """Find out before long work, and not after it, that ``path`` cannot be written.

    Raises:
        UsageError: as `whole`.
    """
    path = Path(path)
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.probe")
    try:
        if path.is_dir():
            raise UsageError(f"{flag} {path} is a folder; give the name of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}; give {flag} a writable place with enough room"
        ) from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes | memoryview, flag: str = "--out") -> None:
    """Write a file whole or not at all."""
    with whole(path, flag) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: str | Path, text: str, flag: str = "--out") -> None:
    """Write a text file (UTF-8) whole or not at all."""
    write_bytes(path, text.encode(), flag)
