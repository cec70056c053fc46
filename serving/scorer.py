"""One shard from its inputs to its Parquet file: read and decode in threads, infer, make rows, write once.

Nothing here knows Ray: `serving.batch` runs one `ShardScorer` in each of its actors, and tests run one by hand.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from export.engine import Engine, open_engine
from pipeline.data import store
from pipeline.errors import WorkError
from serving.attempts import attempt
from serving.decoder import Decoded, Decoder, DecoderConfig, unpack
from serving.ledger import Ledger
from serving.plan import Shard
from serving.rows import SCHEMA, Seen, failed_row, scored_row
from serving.sources import Source, printable

SHOWN_FAILURES = 20
"""Error rows that a report holds."""
METADATA_KEY = b"onepass"
"""Key of the Parquet metadata that counts a shard's rows and errors."""


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """What a worker needs to know."""

    engine: str
    """Path of the engine or bundle."""
    engine_sha256: str
    """What it must be; an engine that was replaced meanwhile would mix."""
    output: str
    version: str
    job: str = ""
    """The run of the job that this worker belongs to."""
    batch_size: int = 16
    threads: int = 1
    """Threads of the engine, and threads that decode."""
    provider: str = "auto"
    max_pixels: int = 100_000_000
    draft: bool = False
    column: str | None = None
    roots: tuple[str, ...] = ()
    """Images outside these places are not read; empty: no limit."""

    def decoder(self, *, size: int, geometry: Literal["squash", "crop"]) -> DecoderConfig:
        """What decoding for an engine of this input needs to know."""
        return DecoderConfig(
            size=size,
            geometry=geometry,
            threads=self.threads,
            ahead=2 * self.batch_size,
            max_pixels=self.max_pixels,
            draft=self.draft,
            column=self.column,
            roots=self.roots,
        )


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What became of a shard; the only thing that travels back to the driver."""

    key: str
    rows: int
    errors: int
    scored: int
    """Rows of these that were made now; the others come from an earlier run."""
    seconds: float
    infer_seconds: float
    failures: str
    """Some of the rows with an error, as a JSON list of their `uri` and `error`."""
    refusal: str = ""
    """Why the worker cannot score at all, whatever the shard; then nothing was done."""


def refused(why: str) -> ShardReport:
    """What a worker answers that could not open its engine."""
    return ShardReport(key="", rows=0, errors=0, scored=0, seconds=0.0, infer_seconds=0.0, failures="[]", refusal=why)


class ShardScorer:
    """Scores shards, one after the other, with one engine."""

    def __init__(self, config: ScorerConfig) -> None:
        self.config = config
        self.ledger = Ledger(config.output)
        self.engine: Engine = open_engine(config.engine, provider=config.provider, threads=config.threads)  # type: ignore[arg-type]
        if self.engine.info.sha256 != config.engine_sha256:
            raise WorkError(
                f"{config.engine} is not the engine that the job began with "
                f"({self.engine.info.sha256[:12]} instead of {config.engine_sha256[:12]}); start the job again"
            )
        info = self.engine.info
        self.decoder = Decoder(config.decoder(size=info.input_size, geometry=info.geometry))

    def score(self, shard: Shard, *, retry_errors: bool = False, decoded: bytes | None = None) -> ShardReport:
        """Score a shard and write its file; with ``retry_errors``, only the rows of an existing one that failed.

        ``decoded``: the shard's images, decoded elsewhere (`serving.decoder.pack`).
        """
        with attempt(self.ledger, self.config.job, shard.key) as careful:
            return self._score(shard, retry_errors=retry_errors, decoded=decoded, careful=careful)

    def _score(self, shard: Shard, *, retry_errors: bool, decoded: bytes | None, careful: bool) -> ShardReport:
        started = time.perf_counter()
        place = self.ledger.part(self.config.version, shard.key)
        earlier = _read_rows(place) if retry_errors else None
        if earlier is not None:
            failed = {number for number, row in enumerate(earlier) if row["status"] == "error"}
            if shard.kind == "tar" and any(earlier[number]["uri"] == printable(shard.source) for number in failed):
                earlier = (
                    None  # the archive itself could not be read to its end: nobody knows how many images there are
                )
        if earlier is not None:
            images = self.decoder.shard(shard, wanted=failed.__contains__, careful=careful)
        elif decoded is not None:
            images = unpack(decoded, size=self.decoder.config.size)
        else:
            images = self.decoder.shard(shard, careful=careful)
        scored, infer_seconds = self._rows(images)
        if earlier is not None:
            for number, row in scored:
                earlier[number] = row
        rows = earlier if earlier is not None else [row for _, row in scored]
        if shard.rows not in (-1, len(rows)):
            raise WorkError(f"shard {shard.key} has {len(rows)} rows instead of {shard.rows}; run the command again")
        failures = _errors(rows)
        store.write_bytes(place, serialise(rows, len(failures)), temporary=self.ledger.temporary)
        return ShardReport(
            key=shard.key,
            rows=len(rows),
            errors=len(failures),
            scored=len(scored),
            seconds=time.perf_counter() - started,
            infer_seconds=infer_seconds,
            failures=json.dumps(failures[:SHOWN_FAILURES]),
        )

    def score_bytes(self, uri: str, data: bytes) -> dict[str, Any]:
        """The row of one encoded image."""
        rows, _ = self._rows(self.decoder.decode([(0, Source(uri, lambda: data))]))
        return rows[0][1]

    def _rows(self, images: Iterable[Decoded]) -> tuple[list[tuple[int, dict[str, Any]]], float]:
        """Rows with their numbers, in order.  Batches depend on the shard alone, so its rows do not depend on luck."""
        rows: list[tuple[int, dict[str, Any]]] = []
        made: list[Future[list[tuple[int, dict[str, Any]]]]] = []
        waiting: list[tuple[int, str, Seen]] = []
        infer_seconds = 0.0
        with ThreadPoolExecutor(1) as finisher:

            def flush() -> None:
                nonlocal infer_seconds
                begun = time.perf_counter()
                logits, masks = self.engine.infer(np.stack([seen.pixels for _, _, seen in waiting]))
                infer_seconds += time.perf_counter() - begun
                made.append(finisher.submit(self._finish, list(waiting), logits, masks))
                waiting.clear()

            for number, uri, seen in images:
                if isinstance(seen, str):
                    rows.append((number, failed_row(uri, seen, engine=self.config.engine_sha256)))
                    continue
                waiting.append((number, uri, seen))
                if len(waiting) == self.config.batch_size:
                    flush()
            if waiting:
                flush()
            for part in made:
                rows += part.result()
        return sorted(rows, key=lambda row: row[0]), infer_seconds

    def _finish(
        self, batch: list[tuple[int, str, Seen]], logits: np.ndarray, masks: np.ndarray
    ) -> list[tuple[int, dict[str, Any]]]:
        names, engine = self.engine.info.class_names, self.config.engine_sha256
        return [
            (number, scored_row(uri, seen, logits[k], masks[k], class_names=names, engine=engine))
            for k, (number, uri, seen) in enumerate(batch)
        ]


def serialise(rows: list[dict[str, Any]], errors: int) -> bytes:
    """Rows as one Parquet file; the same rows give the same bytes."""
    counts = json.dumps({"rows": len(rows), "errors": errors}).encode()
    table = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata({METADATA_KEY: counts}))
    target = io.BytesIO()
    # Masks are compressed already; dictionaries shrink the columns that repeat.
    repeated: Any = ["status", "class_name", "engine", "label"]  # the stubs of pyarrow know only yes and no
    pq.write_table(table, target, compression="zstd", use_dictionary=repeated)
    return target.getvalue()


def read_counts(place: str) -> tuple[int, int]:
    """(rows, errors) of a finished shard, from its footer."""
    with store.open_file(place) as file:
        metadata = pq.ParquetFile(file).schema_arrow.metadata
    counts = json.loads(metadata[METADATA_KEY])
    return counts["rows"], counts["errors"]


def read_errors(place: str) -> list[dict[str, str]]:
    """`uri` and `error` of the rows of a finished shard that failed."""
    data = store.read_bytes(place)
    return _errors(pq.read_table(io.BytesIO(data), columns=["uri", "status", "error"]).to_pylist())


def _errors(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"uri": row["uri"], "error": row["error"]} for row in rows if row["status"] == "error"]


def _read_rows(place: str) -> list[dict[str, Any]] | None:
    data = store.read_optional(place)
    return None if data is None else pq.read_table(io.BytesIO(data)).to_pylist()


def report_fields(report: ShardReport) -> dict[str, Any]:
    """A report as one row of a Ray data set."""
    return {name: [value] for name, value in vars(report).items()}
