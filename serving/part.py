"""The file of one finished shard: Parquet, written a group of rows at a time, its rows and errors counted in its footer."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data import store
from serving.rows import schema

GROUP_ROWS = 4096
"""Rows that are in memory at a time: all of a shard, unless it is a large archive."""
METADATA_KEY = b"onepass"
"""Key of the Parquet metadata that counts rows and errors."""
FOOTER_BYTES = 1 << 16
"""Read of the end of a file: one request for its footer, which takes some kilobytes."""
SHOWN_FAILURES = 20
"""Error rows that a writer remembers."""


class PartWriter:
    """Writes rows to an open file; the same groups of rows give the same bytes."""

    def __init__(self, file: BinaryIO, *, topk: int = 0) -> None:
        self.rows = self.errors = 0
        self.failures: list[dict[str, str]] = []
        """`uri` and `error` of some of the rows that are errors."""
        self._schema = schema(topk)
        # Masks are compressed already; dictionaries shrink the columns that repeat.
        repeated: Any = ["status", "class_name", "engine", "label"]  # the stubs of pyarrow know only yes and no
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd", use_dictionary=repeated)

    def add(self, rows: list[dict[str, Any]]) -> None:
        failures = _errors(rows)
        self.rows += len(rows)
        self.errors += len(failures)
        self.failures += failures[: SHOWN_FAILURES - len(self.failures)]
        self._writer.write_table(pa.Table.from_pylist(rows, schema=self._schema))

    def close(self) -> None:
        counts = json.dumps({"rows": self.rows, "errors": self.errors}).encode()
        self._writer.add_key_value_metadata({METADATA_KEY: counts})
        self._writer.close()


def read_counts(place: str) -> tuple[int, int]:
    """(rows, errors) of a finished shard, from its footer."""
    end = store.read_end(place, FOOTER_BYTES)
    footer = int.from_bytes(end[-8:-4], "little") + 8  # Parquet ends in the length of its footer and four letters
    if footer > len(end):
        end = store.read_end(place, footer)
    counts = json.loads(pq.read_metadata(io.BytesIO(end)).metadata[METADATA_KEY])
    return counts["rows"], counts["errors"]


def read_errors(place: str) -> list[dict[str, str]]:
    """`uri` and `error` of the rows of a finished shard that failed."""
    data = store.read_bytes(place)
    return _errors(pq.read_table(io.BytesIO(data), columns=["uri", "status", "error"]).to_pylist())


def failed_numbers(part: bytes) -> dict[int, str]:
    """`uri` by number of the rows that failed, of the bytes of a finished shard."""
    rows = pq.read_table(io.BytesIO(part), columns=["uri", "status"]).to_pylist()
    return {number: row["uri"] for number, row in enumerate(rows) if row["status"] == "error"}


def replaced(part: bytes, rows: dict[int, dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The rows of a finished shard, a group at a time, those of ``rows`` in the place of the old ones of their number."""
    first = 0
    for batch in pq.ParquetFile(io.BytesIO(part)).iter_batches(GROUP_ROWS):
        old: list[dict[str, Any]] = batch.to_pylist()
        yield [rows.get(first + k, row) for k, row in enumerate(old)]
        first += batch.num_rows


def _errors(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"uri": row["uri"], "error": row["error"]} for row in rows if row["status"] == "error"]
