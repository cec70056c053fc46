"""The images of one shard, one after the other, each with a way to get at its bytes."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data import store
from pipeline.data.decode import ImageError
from pipeline.data.images import image_columns, no_column, reading
from pipeline.data.listing import is_image_name
from serving.plan import Shard
from serving.roots import within

OUTSIDE = "outside the roots of the service"
READ_ROWS = 64
"""Rows of a Parquet file that are in memory at a time."""


@dataclass(frozen=True)
class Source:
    """One input image."""

    uri: str
    read: Callable[[], bytes]
    """Its encoded bytes; raises `ImageError` of kind ``unreadable``."""


def sources(shard: Shard, *, column: str | None = None, roots: Sequence[str] = ()) -> Iterator[Source]:
    """The inputs of a shard in order.

    ``column``: the Parquet column to read, when it shall not be guessed.  ``roots``: with any, images outside them, which a
    list or a link may name, are not read.
    """
    if roots and shard.source and not within(shard.source, roots):
        for _ in range(max(1, shard.last - shard.first)):
            yield Source(shard.source, _given(None, OUTSIDE))
    elif shard.kind == "image":
        yield from (Source(uri, _reader(uri, roots)) for uri in shard.uris)
    elif shard.kind == "tar":
        yield from _tar(shard.source)
    else:
        yield from _parquet(shard, column, roots)


def printable(uri: str) -> str:
    """A name as text that Parquet and JSON can hold: bytes that are no UTF-8 are written as escapes."""
    return uri.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _reader(place: str, roots: Sequence[str]) -> Callable[[], bytes]:
    def read() -> bytes:
        if roots and not within(place, roots):
            raise ImageError("unreadable", OUTSIDE)
        try:
            return store.read_bytes(place)
        except store.ReadError as error:
            raise ImageError("unreadable", str(error)) from error

    return read


def _given(data: bytes | None, what: str = "the bytes are null") -> Callable[[], bytes]:
    def read() -> bytes:
        if data is None:
            raise ImageError("unreadable", what)
        return data

    return read


def _tar(place: str) -> Iterator[Source]:
    """Members that are images, as ``<tar>#<member>``; damage ends in one more source, which says so."""
    count = 0
    try:
        with store.open_file(place) as file, reading(place), tarfile.open(fileobj=file, mode="r|*") as archive:
            for member in archive:
                if not (member.isreg() and is_image_name(member.name)):
                    continue
                count += 1
                if member.size > store.MAX_BYTES:
                    yield Source(
                        f"{place}#{member.name}", _given(None, f"{member.size} bytes, the limit is {store.MAX_BYTES}")
                    )
                    continue
                content = archive.extractfile(member)
                data = content.read() if content else b""
                if len(data) < member.size:
                    raise tarfile.ReadError("unexpected end of data")
                yield Source(f"{place}#{member.name}", _given(data))
    except (tarfile.TarError, EOFError, OSError, store.ReadError) as error:
        yield Source(place, _given(None, f"the archive is damaged after {count} images ({error})"))


def _parquet(shard: Shard, column: str | None, roots: Sequence[str]) -> Iterator[Source]:
    """As many sources as the shard has rows, whatever has become of the file since it was planned."""
    place = shard.source
    row = shard.first
    why = "it has fewer rows than when the job was planned; run the command again with --new-plan"
    try:
        with store.open_file(place) as raw, reading(place):
            if shard.first == shard.last:
                pq.ParquetFile(raw)
                why = "it could not be read when the job was planned; run the command again with --new-plan"
            else:
                for source in _parquet_rows(pq.ParquetFile(raw), shard, column, roots):
                    yield source
                    row += 1
    except (pa.ArrowException, OSError, store.ReadError) as error:
        why = " ".join(str(error).split())[:200]
    if shard.first == shard.last:
        yield Source(place, _given(None, f"cannot be read as Parquet ({why})"))
    for number in range(row, shard.last):
        yield Source(f"{place}#{number}", _given(None, f"cannot be read as Parquet ({why})"))


def _parquet_rows(file: pq.ParquetFile, shard: Shard, column: str | None, roots: Sequence[str]) -> Iterator[Source]:
    """The shard's rows in order; a damaged row group becomes rows that say so, and the others are read."""
    content, name = image_columns(file.schema_arrow, column)
    columns = [c for c in (content, name) if c is not None]
    if not columns:
        raise pa.ArrowInvalid(no_column(file.schema_arrow, column))
    end = 0
    for group in range(file.metadata.num_row_groups):
        start, end = end, end + file.metadata.row_group(group).num_rows
        row, last = max(start, shard.first), min(end, shard.last)
        if row >= last:
            continue
        try:
            for record in _records(file, group, columns, row - start, last - start):
                yield _parquet_source(record, content, name, shard.source, row, roots)
                row += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            why = " ".join(str(error).split())[:200]
            for number in range(row, last):
                yield Source(f"{shard.source}#{number}", _given(None, f"row group {group} is damaged ({why})"))


def _records(file: pq.ParquetFile, group: int, columns: list[str], first: int, last: int) -> Iterator[dict[str, Any]]:
    """Rows ``first`` to ``last`` of a row group, `READ_ROWS` in memory at a time."""
    row = 0
    for batch in file.iter_batches(READ_ROWS, row_groups=[group], columns=columns):
        if row + batch.num_rows > first:
            yield from batch.slice(max(first - row, 0), min(last, row + batch.num_rows) - max(first, row)).to_pylist()
        row += batch.num_rows
        if row >= last:
            return


def _parquet_source(
    record: dict[str, Any], content: str | None, name: str | None, place: str, row: int, roots: Sequence[str]
) -> Source:
    folder = place.rsplit("/", 1)[0]
    given = record.get(name) if name else None
    if content is None:
        if given is None:
            return Source(f"{place}#{row}", _given(None, "the URI is null"))
        uri = store.place_of(given) if store.is_remote(given) or given.startswith("/") else store.join(folder, given)
        return Source(uri, _reader(uri, roots))
    value = record[content]
    data = value.get("bytes") if isinstance(value, dict) else value
    return Source(str(given) if given is not None else f"{place}#{row}", _given(data))
