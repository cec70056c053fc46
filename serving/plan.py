"""The shard plan: which inputs are scored together, under which name.

Listed images are cut where a hash of the image's own name says so (content-defined chunking), so that a new or a removed
file changes its own shard and not all the ones behind it.  A shard's key is a hash of everything that its rows depend on:
the version (engine and settings) and the names, sizes and stamps of its inputs.  One shard becomes one Parquet file named
after its key; whoever plans the same input gets the same keys, on any machine, however often it is asked.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data import store
from pipeline.data.folders import Entry
from pipeline.data.images import image_columns, no_column, reading
from pipeline.errors import UsageError
from serving.inputs import Kind
from serving.roots import within

SMALLEST_SHARD = 32
LARGEST_SHARD = 2048
"""Images in a shard: small sets are cut finer, so that every worker has something to do and progress is seen."""
SHARDS_PER_SET = 64
SHARDS_PER_FILE = 128
"""Shards whose plan lies in one file."""
FOOTER_THREADS = 16

_COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("kind", pa.string()),
        ("source", pa.binary()),  # names on a file system need not be UTF-8
        ("first", pa.int64()),
        ("last", pa.int64()),
        ("rows", pa.int64()),
        ("size", pa.int64()),
        ("uris", pa.list_(pa.binary())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Inputs that are scored together."""

    key: str
    kind: Kind
    source: str = ""
    """The container, for Parquet and tar."""
    first: int = 0
    """The first row of the container."""
    last: int = 0
    """One past the last row."""
    rows: int
    """Number of inputs; -1 while nobody has counted them (tar)."""
    size: int
    """Bytes of the inputs, as far as they are known."""
    uris: tuple[str, ...] = ()
    """The images themselves, for listed ones."""


class PlannedShard(NamedTuple):
    """Where a shard stands in its plan: all that a driver keeps of it."""

    key: str
    rows: int
    size: int
    file: int
    group: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A stored plan."""

    id: str
    folder: str
    shards: list[PlannedShard]
    others: dict[str, int]
    """Files that were left out, by suffix."""

    @property
    def rows(self) -> int | None:
        """Number of inputs; None when there are containers that nobody has counted."""
        return None if any(shard.rows < 0 for shard in self.shards) else sum(shard.rows for shard in self.shards)

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)


def choose_shard_size(images: int) -> int:
    """A power of two that gives a set of so many images about `SHARDS_PER_SET` shards, within the limits."""
    size = SMALLEST_SHARD
    while size < LARGEST_SHARD and size * SHARDS_PER_SET < images:
        size *= 2
    return size


def cut(
    entries: Iterable[tuple[Kind, Entry]],
    *,
    version: str,
    shard_size: int,
    column: str | None = None,
    roots: Sequence[str] = (),
) -> Iterator[Shard]:
    """Cut a listing into shards of about ``shard_size`` inputs, at most twice as many; memory is that of one shard.

    Parquet is cut by rows, at the ends of row groups where it can be, and its footers are read; a tar file is one shard.
    ``column``: the one that will be read of Parquet, when it shall not be guessed.  ``roots``: with any, files outside them,
    to which a link may lead, are not opened.

    Raises:
        UsageError: the first Parquet file has no column to read.
        StoreError: a Parquet file's footer could not be fetched.
    """
    times: dict[str, int] = {}

    def once(shard: Shard) -> Shard:
        # The same inputs may be listed twice; their rows are then due twice, under two names.
        times[shard.key] = times.get(shard.key, 0) + 1
        if times[shard.key] == 1:
            return shard
        return replace(shard, key=_digest([shard.key, str(times[shard.key])]))

    for kind, group in itertools.groupby(entries, key=lambda found: found[0]):
        found = (entry for _, entry in group)
        if kind == "image":
            shards = (_image_shard(part, version) for part in _chunks(found, shard_size))
        elif kind == "tar":
            shards = (
                Shard(
                    key=_digest([version, kind, *_identity(e)]), kind=kind, source=e.place, rows=-1, size=max(e.size, 0)
                )
                for e in found
            )
        else:
            shards = _parquet_shards(found, version, shard_size, column, roots)
        yield from map(once, shards)


def _chunks(entries: Iterable[Entry], shard_size: int) -> Iterator[list[Entry]]:
    part: list[Entry] = []
    smallest, spread = max(1, shard_size // 2), max(1, shard_size // 2)
    for entry in entries:
        part.append(entry)
        if len(part) >= smallest and (_name_hash(entry.place) % spread == 0 or len(part) >= 2 * shard_size):
            yield part
            part = []
    if part:
        yield part


def _name_hash(place: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(place), digest_size=8).digest(), "little")


def _identity(entry: Entry) -> tuple[str, str, str]:
    return entry.place, str(entry.size), entry.stamp


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(os.fsencode(part))
        digest.update(b"\0")  # no name holds it
    return digest.hexdigest()[:20]


def _image_shard(part: list[Entry], version: str) -> Shard:
    identity = itertools.chain([version, "image"], itertools.chain.from_iterable(map(_identity, part)))
    return Shard(
        key=_digest(identity),
        kind="image",
        rows=len(part),
        size=sum(max(entry.size, 0) for entry in part),
        uris=tuple(entry.place for entry in part),
    )


def _parquet_shards(
    entries: Iterable[Entry], version: str, shard_size: int, column: str | None, roots: Sequence[str]
) -> Iterator[Shard]:
    known = False
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        for batch in _batched(entries, 8 * FOOTER_THREADS):
            for entry, footer in zip(batch, pool.map(partial(_footer, roots=roots), batch), strict=True):
                if footer is not None and not known:
                    known = True
                    schema = footer.schema.to_arrow_schema()
                    if not any(image_columns(schema, column)):
                        raise UsageError(f"--input: {entry.place} has {no_column(schema, column)}")
                groups = _row_groups(footer)
                total = sum(rows for rows, _ in groups)
                size = sum(size for _, size in groups)
                ranges = [(0, 0)] if footer is None else _row_ranges([rows for rows, _ in groups], shard_size)
                for first, last in ranges:
                    yield Shard(
                        key=_digest([version, "parquet", *_identity(entry), str(first), str(last)]),
                        kind="parquet",
                        source=entry.place,
                        first=first,
                        last=last,
                        rows=max(last - first, 1),  # what cannot be read is one row that says so
                        size=size * (last - first) // max(total, 1),
                    )


def _footer(entry: Entry, roots: Sequence[str]) -> pq.FileMetaData | None:
    """The footer of a Parquet file; None when the file cannot or must not be read, or is none."""
    if roots and not within(entry.place, roots):
        return None
    try:
        with store.open_file(entry.place) as file, reading(entry.place):
            return pq.ParquetFile(file).metadata
    except (pa.ArrowException, store.ReadError, OSError, UnicodeDecodeError):
        return None


def _row_groups(footer: pq.FileMetaData | None) -> list[tuple[int, int]]:
    """(rows, bytes) of each row group."""
    groups = (footer.row_group(k) for k in range(footer.num_row_groups)) if footer else ()
    return [(group.num_rows, group.total_byte_size) for group in groups]


def _row_ranges(groups: list[int], shard_size: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, each of ``shard_size`` to three times as many as far as there are so many.

    Row groups stay whole unless they are larger than twice the shard size: whoever reads a part of one reads past the rest.
    """
    first = last = 0
    for group in groups:
        parts = max(1, group // shard_size) if group > 2 * shard_size else 1
        for k in range(parts):
            last += group * (k + 1) // parts - group * k // parts
            if last - first >= shard_size:
                yield first, last
                first = last
    if last > first:
        yield first, last


def _batched(items: Iterable[Entry], count: int) -> Iterator[list[Entry]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, count)):
        yield batch


def write_plan(shards: Iterable[Shard], folder: str, *, temporary: str | None = None, others: Any = None) -> Plan:
    """Store a plan below ``folder`` under its own hash; one that is there already is left as it is.

    ``others``: a mapping that is read after the last shard, when the listing's counts are whole.
    """
    digest = hashlib.sha256()
    planned: list[PlannedShard] = []
    iterator = iter(shards)
    with TemporaryDirectory() as local:
        count = 0
        while part := list(itertools.islice(iterator, SHARDS_PER_FILE)):
            (Path(local) / _file_name(count)).write_bytes(_serialise(part))
            for group, shard in enumerate(part):
                digest.update(shard.key.encode())
                planned.append(PlannedShard(shard.key, shard.rows, shard.size, count, group))
            count += 1
        name = digest.hexdigest()[:16]
        place = store.join(folder, name)
        left_out = dict(sorted((others or {}).items()))
        if store.read_optional(store.join(place, "plan.json")) is None:
            for number in range(count):
                data = (Path(local) / _file_name(number)).read_bytes()
                store.write_bytes(store.join(place, _file_name(number)), data, temporary=temporary)
            summary = {"id": name, "files": count, "shards": [list(shard) for shard in planned], "others": left_out}
            store.write_bytes(store.join(place, "plan.json"), json.dumps(summary).encode(), temporary=temporary)
    return Plan(id=name, folder=place, shards=planned, others=left_out)


def read_plan(folder: str, name: str) -> Plan | None:
    """A stored plan; None when there is none of this name."""
    place = store.join(folder, name)
    data = store.read_optional(store.join(place, "plan.json"))
    if data is None:
        return None
    summary = json.loads(data)
    return Plan(
        id=name, folder=place, shards=[PlannedShard(*shard) for shard in summary["shards"]], others=summary["others"]
    )


def read_shard(folder: str, file: int, group: int) -> Shard:
    """One shard of a stored plan."""
    data = store.read_bytes(store.join(folder, _file_name(file)))
    (row,) = pq.ParquetFile(io.BytesIO(data)).read_row_group(group).to_pylist()
    uris = tuple(os.fsdecode(uri) for uri in row.pop("uris"))
    return Shard(**(row | {"source": os.fsdecode(row["source"]), "uris": uris}))


def _file_name(number: int) -> str:
    return f"{number:05d}.parquet"


def _serialise(part: list[Shard]) -> bytes:
    """Shards as Parquet, each a row group of its own, so that a worker reads no more than its own."""
    target = io.BytesIO()
    with pq.ParquetWriter(target, _COLUMNS, compression="zstd") as writer:
        for shard in part:
            row = vars(shard) | {"source": os.fsencode(shard.source), "uris": [os.fsencode(uri) for uri in shard.uris]}
            writer.write_table(pa.Table.from_pylist([row], schema=_COLUMNS))
    return target.getvalue()
