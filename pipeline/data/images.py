"""Reading the pictures of a data set by their paths, wherever they are: files, members of tar shards, rows of Parquet.

A path is relative to the root of the data set, or a place of its own (absolute, or ``s3://...``):

* ``train/cat/1.jpg``: a file or an object
* ``train/0001.tar#1536+7321``: 7321 bytes from byte 1536 of a tar shard
* ``train/0001.parquet#3:17``: row 17 of row group 3 of a Parquet file
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data import store
from pipeline.data.decode import ImageError, decode_image

ROW_GROUPS = 10
"""Row groups of Parquet that are kept in memory; `pipeline.data.batches` shuffles within fewer of them."""

_MEMBER = re.compile(r"^(?P<file>.+\.tar)#(?P<offset>\d+)\+(?P<size>\d+)$", re.IGNORECASE)
_ROW = re.compile(r"^(?P<file>.+\.(?:parquet|pq))#(?P<group>\d+):(?P<row>\d+)$", re.IGNORECASE)
BYTES_NAMES = ("image", "bytes", "image_bytes", "jpg", "jpeg", "png", "img", "data", "content")
"""Names of a column of encoded images in Parquet, in order of preference."""
URI_NAMES = ("uri", "path", "file", "file_name", "filename", "url", "image_path")
"""Names of a column of URIs, in a CSV list and in Parquet, in order of preference."""


@dataclass(frozen=True)
class Row:
    """Where a picture is in a Parquet file."""

    file: str
    group: int
    row: int


def row_of(path: str) -> Row | None:
    """The row that ``path`` means; none when it means something else."""
    match = _ROW.match(path)
    return Row(match["file"], int(match["group"]), int(match["row"])) if match else None


class Images:
    """The pictures below a root; safe to be used by several threads."""

    def __init__(self, root: str) -> None:
        """``root``: a local folder or a remote URI."""
        self.root = store.place_of(root)
        self._groups: OrderedDict[tuple[str, int], Future[pa.Array]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str) -> bytes:
        """The encoded picture.

        Raises:
            ImageError: of kind ``unreadable``.
        """
        try:
            if row := row_of(path):
                return self._row(self._place(row.file), row)
            if match := _MEMBER.match(path):
                return store.read_range(self._place(match["file"]), int(match["offset"]), int(match["size"]))
            return store.read_bytes(self._place(path))
        except (store.ReadError, pa.ArrowException, OSError) as error:
            raise ImageError("unreadable", str(error)) from error

    def image(self, path: str) -> np.ndarray:
        """The picture, (H, W, 3) uint8 RGB, upright.

        Raises:
            ImageError: it cannot be read or decoded.
        """
        return decode_image(self.read(path))

    def _place(self, path: str) -> str:
        return path if store.is_remote(path) or path.startswith("/") else store.join(self.root, path)

    def _row(self, place: str, row: Row) -> bytes:
        value = self._group(place, row.group)[row.row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise ImageError("unreadable", "the bytes are null")
        return data

    def _group(self, place: str, group: int) -> pa.Array:
        """The pictures of a row group; read once, by the thread that asks first."""
        key = (place, group)
        with self._lock:
            found = self._groups.get(key)
            mine = found is None
            if found is None:
                found = self._groups[key] = Future()
                while len(self._groups) > ROW_GROUPS:
                    self._groups.popitem(last=False)
            else:
                self._groups.move_to_end(key)
        if mine:
            try:
                with store.open_file(place) as raw:
                    file = pq.ParquetFile(raw)
                    content, _ = image_columns(file.schema_arrow, None)
                    if content is None:
                        raise store.ReadError("no column of images")
                    found.set_result(file.read_row_group(group, columns=[content]).column(0).combine_chunks())
            except BaseException as error:
                with self._lock:
                    self._groups.pop(key, None)
                found.set_exception(error)
        return found.result()


@contextlib.contextmanager
def reading(place: str) -> Iterator[None]:
    """While an open file is read: tell a store that fails from content that is damaged.

    What Arrow, gzip and the like raise about content is an `OSError` without a number; it passes as it is.

    Raises:
        store.StoreError: the disk or the network failed.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise store.StoreError(
            f"{place}: reading it broke off ({error.strerror or error}); run the command again"
        ) from error


def image_columns(schema: pa.Schema, column: str | None) -> tuple[str | None, str | None]:
    """(column of encoded images, column of names) of a Parquet schema.

    With images, the names are what the rows are called; without, they are URIs that are read.  A column of images is of
    type binary, or a struct with a binary field ``bytes``.  ``column`` decides for one column, whatever it is.
    """
    binary = [field.name for field in schema if _holds_bytes(field.type)]
    text = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    name = next((wanted for wanted in URI_NAMES if wanted in text), None)
    if column is not None:
        return (column, name) if column in binary else (None, column if column in text else None)
    content = next((wanted for wanted in BYTES_NAMES if wanted in binary), None)
    if content is None and name is None and len(binary) == 1:
        content = binary[0]
    return content, name


def no_column(schema: pa.Schema, column: str | None) -> str:
    """What is wrong with a Parquet schema that has no column to read."""
    if column is not None:
        return f"no column {column!r} of images or URIs among {', '.join(schema.names)}; correct --column"
    return f"no column of images or URIs among {', '.join(schema.names)}; name it with --column"


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
