"""One shard from its inputs to its Parquet file: read and decode in threads, infer, make rows, write.

Nothing here knows Ray: `serving.batch` runs one `ShardScorer` in each of its actors, and tests run one by hand.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.data import store
from pipeline.errors import WorkError
from serving.attempts import attempt
from serving.class_masks import ask, open_with_masks
from serving.decoder import Decoded, Decoder, DecoderConfig, unpack
from serving.ledger import Ledger
from serving.part import GROUP_ROWS, PartWriter, failed_numbers, replaced
from serving.plan import Shard
from serving.rows import Answers, Seen, answer_row, failed_row
from serving.sources import Source, printable


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
    topk: int = 0
    """Classes whose masks are stored beside that of the predicted one; 0 for none."""
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
        self._infer_seconds = 0.0
        self.engine = open_with_masks(config.engine, topk=config.topk, provider=config.provider, threads=config.threads)
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
        self._infer_seconds = 0.0
        place = self.ledger.part(self.config.version, shard.key)
        earlier = store.read_optional(place) if retry_errors else None
        failed = {} if earlier is None else failed_numbers(earlier)
        if shard.kind == "tar" and printable(shard.source) in failed.values():
            earlier = None  # the archive itself could not be read to its end: nobody knows how many images there are
        with store.writing(place, temporary=self.ledger.temporary) as file:
            part = PartWriter(file, topk=self.config.topk)
            if earlier is not None:
                images = self.decoder.shard(shard, wanted=failed.__contains__, careful=careful)
                made = {number: row for group in self._groups(images) for number, row in group}
                scored = len(made)
                for rows in replaced(earlier, made):
                    part.add(rows)
            else:
                elsewhere = None if decoded is None else unpack(decoded, size=self.decoder.config.size)
                for group in self._groups(elsewhere or self.decoder.shard(shard, careful=careful)):
                    part.add([row for _, row in group])
                scored = part.rows
            part.close()
            if shard.rows not in (-1, part.rows):
                raise WorkError(
                    f"shard {shard.key} has {part.rows} rows instead of {shard.rows}; run it again with --new-plan"
                )
        return ShardReport(
            key=shard.key,
            rows=part.rows,
            errors=part.errors,
            scored=scored,
            seconds=time.perf_counter() - started,
            infer_seconds=self._infer_seconds,
            failures=json.dumps(part.failures),
        )

    def score_bytes(self, uri: str, data: bytes) -> dict[str, Any]:
        """The row of one encoded image."""
        ((row,),) = self._groups(self.decoder.decode([(0, Source(uri, lambda: data))]))
        return row[1]

    def _groups(self, images: Iterable[Decoded]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
        """Rows with their numbers, in order, `GROUP_ROWS` or a few more at a time.

        Batches depend on the shard alone, so its rows do not depend on luck.
        """
        rows: list[tuple[int, dict[str, Any]]] = []
        made: list[Future[list[tuple[int, dict[str, Any]]]]] = []
        waiting: list[tuple[int, str, Seen]] = []
        count = 0
        with ThreadPoolExecutor(1) as finisher:

            def flush() -> None:
                begun = time.perf_counter()
                answers = ask(self.engine, np.stack([seen.pixels for _, _, seen in waiting]), topk=self.config.topk)
                self._infer_seconds += time.perf_counter() - begun
                made.append(finisher.submit(self._finish, list(waiting), answers))
                waiting.clear()

            def collect() -> list[tuple[int, dict[str, Any]]]:
                found = sorted([*rows, *(row for part in made for row in part.result())], key=lambda row: row[0])
                rows.clear()
                made.clear()
                return found

            for number, uri, seen in images:
                count += 1
                if isinstance(seen, str):
                    rows.append((number, failed_row(uri, seen, engine=self.config.engine_sha256)))
                else:
                    waiting.append((number, uri, seen))
                if len(waiting) == self.config.batch_size:
                    flush()
                if count >= GROUP_ROWS and not waiting:  # every image so far has, or is about to have, its row
                    yield collect()
                    count = 0
            if waiting:
                flush()
            if count:
                yield collect()

    def _finish(self, batch: list[tuple[int, str, Seen]], answers: Answers) -> list[tuple[int, dict[str, Any]]]:
        names, engine = self.engine.info.class_names, self.config.engine_sha256
        return [
            (number, answer_row(uri, seen, answers, k, class_names=names, engine=engine))
            for k, (number, uri, seen) in enumerate(batch)
        ]


def report_fields(report: ShardReport) -> dict[str, Any]:
    """A report as one row of a Ray data set."""
    return {name: [value] for name, value in vars(report).items()}
