"""Reading an output folder as its users do."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from serving.rows import schema


def read_scores(output: Path | str) -> pa.Table:
    """All rows of an output, in order of their URIs, after a look at its columns."""
    table = pq.read_table(output)
    assert table.schema.equals(schema("topk" in table.column_names), check_metadata=False)
    return table.sort_by("uri")


def read_parts(output: Path) -> dict[str, bytes]:
    """The finished shards by name."""
    return {path.name: path.read_bytes() for path in sorted(output.glob("*.parquet"))}
