"""Pictures with their masks drawn over them, of the rows that a person should look at first."""

from __future__ import annotations

import heapq
import io
from pathlib import PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from pipeline.data import store
from pipeline.data.decode import ImageError, decode_image
from serving.codec import encode_png, overlay
from serving.ledger import Ledger, Version
from serving.plan import Plan, Shard, read_shard
from serving.sources import Source, printable, sources


def draw_overlays(ledger: Ledger, version: Version, plan: Plan, count: int) -> str:
    """Draw the ``count`` most and the ``count`` least confident images of an output; returns the folder.

    Memory is that of ``count`` rows: scores are read a shard at a time.  The same scores give the same choice.
    """
    most: list[tuple[float, str, int, int]] = []
    least: list[tuple[float, str, int, int]] = []
    for number, planned in enumerate(plan.shards):
        with store.open_file(ledger.part(version.id, planned.key)) as file:
            table = pq.read_table(file, columns=["uri", "score"]).to_pylist()
        found = [(row["score"], row["uri"], number, k) for k, row in enumerate(table) if row["score"] is not None]
        most = heapq.nsmallest(count, most + found, key=lambda item: (-item[0], item[1]))
        least = heapq.nsmallest(count, least + found, key=lambda item: (item[0], item[1]))
    folder = store.join(ledger.output, "_overlays")
    for name, chosen in (("most", most), ("least", least)):
        for rank, (score, uri, number, row) in enumerate(chosen, start=1):
            planned = plan.shards[number]
            shard = read_shard(plan.folder, planned.file, planned.group)
            png = _drawn(ledger.part(version.id, planned.key), row, shard, version)
            if png is not None:
                stem = PurePosixPath(uri.rpartition("#")[2] or uri).stem
                store.write_bytes(store.join(folder, f"{name}-{rank:03d}-{score:.3f}-{stem[:80]}.png"), png)
    return folder


def _drawn(part: str, number: int, shard: Shard, version: Version) -> bytes | None:
    """The overlay of one row; None when its image has changed or gone since."""
    row: dict[str, Any] = pq.read_table(io.BytesIO(store.read_bytes(part))).slice(number, 1).to_pylist()[0]
    found: Source | None = next(
        (s for k, s in enumerate(sources(shard, column=version.settings["column"])) if k == number), None
    )
    if found is None or printable(found.uri) != row["uri"]:
        return None
    try:
        image = decode_image(found.read(), max_pixels=version.settings["max_pixels"])
    except ImageError:
        return None
    return encode_png(overlay(image, row)) if image.shape[:2] == (row["height"], row["width"]) else None
