"""The Ray Data pipeline: one row for each shard in, one small report out.

A worker reads its shard's inputs, scores them and writes their file itself, so pixels do not enter Ray's object store, and
a worker or a node that dies costs the shards that it was at, which Ray hands to others.  Only where machines without an
engine decode for those with one (``--decode-cpus``) do fitted images travel, one message for each shard.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from pipeline.errors import UsageError, WorkError
from serving.cluster import Workers

if TYPE_CHECKING:
    from serving.job import Prepared
    from serving.progress import Progress


class ShardWorker:
    """What runs in each actor: a `ShardScorer` and the shards that come.

    An engine that does not fit its machine is told by the reports: raised here, Ray would wrap it in its own tracebacks.
    """

    def __init__(self, *, config: dict[str, Any], plan: str, retry_errors: bool) -> None:
        from ray.util.metrics import Counter

        from serving.scorer import ScorerConfig, ShardScorer

        self.refusal = ""
        try:
            self.scorer = ShardScorer(ScorerConfig(**config))
        except (UsageError, WorkError) as error:
            self.refusal = str(error)
        self.plan = plan
        self.retry_errors = retry_errors
        self.images = Counter("onepass_batch_images", description="Rows written by batch jobs", tag_keys=("status",))

    def __call__(self, batch: Any) -> dict[str, list[Any]]:
        from serving.plan import read_shard
        from serving.scorer import refused, report_fields

        if self.refusal:
            return report_fields(refused(self.refusal))
        (row,) = batch.select(["file", "group"]).to_pylist()
        shard = read_shard(self.plan, row["file"], row["group"])
        decoded = batch.column("decoded")[0].as_buffer() if "decoded" in batch.column_names else None
        report = self.scorer.score(shard, retry_errors=self.retry_errors, decoded=decoded)
        right = report.scored - report.errors
        if right:
            self.images.inc(right, tags={"status": "ok"})
        if report.errors:
            self.images.inc(report.errors, tags={"status": "error"})
        return report_fields(report)


class ShardDecoder:
    """Decodes whole shards on machines that do not infer; the pixels travel as one message for each shard."""

    def __init__(self, *, config: dict[str, Any], plan: str, output: str, job: str) -> None:
        from serving.decoder import Decoder, DecoderConfig
        from serving.ledger import Ledger

        self.decoder = Decoder(DecoderConfig(**config))
        self.plan = plan
        self.ledger, self.job = Ledger(output), job

    def __call__(self, batch: Any) -> dict[str, list[Any]]:
        from serving.attempts import attempt
        from serving.decoder import pack
        from serving.plan import read_shard

        (row,) = batch.select(["file", "group"]).to_pylist()
        shard = read_shard(self.plan, row["file"], row["group"])
        with attempt(self.ledger, self.job, f"{shard.key}-decoding") as careful:
            decoded = pack(self.decoder.shard(shard, careful=careful))
        return {"file": [row["file"]], "group": [row["group"]], "decoded": [decoded]}


def score_shards(prepared: Prepared, workers: Workers, progress: Progress) -> Iterator[dict[str, Any]]:
    """Score the pending shards; yields a report for each, in the order in which they are finished.

    Raises:
        UsageError: the engine does not fit the machine of a worker.
        WorkError: a worker could not begin or go on.
    """
    import ray
    import ray.exceptions
    from ray.data import ActorPoolStrategy, DataContext

    from serving.engines import engine_input
    from serving.progress import Gauges

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    request = prepared.request
    config = prepared.scorer_config(threads=max(1, int(workers.cpus)), run=uuid.uuid4().hex[:8])
    rows = [{"file": shard.file, "group": shard.group} for shard in prepared.pending]
    shards = ray.data.from_items(rows, override_num_blocks=len(rows))
    if request.decode_cpus and not request.retry_errors:
        size, geometry = engine_input(request.engine)
        decoder = asdict(replace(config.decoder(size=size, geometry=geometry), threads=1))
        shards = shards.map_batches(
            ShardDecoder,
            fn_constructor_kwargs={
                "config": decoder,
                "plan": prepared.plan.folder,
                "output": config.output,
                "job": config.job,
            },
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=min(request.decode_cpus, len(rows)), max_tasks_in_flight_per_actor=2),
            num_cpus=1,
            # Ray's own strategy keeps what needs no GPU away from nodes that have one; that of Ray Data spreads.
            scheduling_strategy="DEFAULT",
        )
    worker = {"config": asdict(config), "plan": prepared.plan.folder, "retry_errors": request.retry_errors}
    reports = shards.map_batches(
        ShardWorker,
        fn_constructor_kwargs=worker,
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=workers.count, max_tasks_in_flight_per_actor=2),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
    )
    gauges = Gauges(config.output)
    try:
        for report in reports.iter_rows():
            if report["refusal"]:
                raise UsageError(report["refusal"])
            yield report
            gauges.show(progress)  # it has counted the report by now
    except ray.exceptions.RayError as error:
        raise WorkError(cause(error)) from error


def cause(error: BaseException) -> str:
    """One line that says what went wrong in a worker, without Ray's own story around it."""
    found: BaseException = error
    while (deeper := getattr(found, "cause", None) or found.__cause__) is not None and deeper is not found:
        found = deeper
    text = " ".join(str(found).split())
    return f"a worker failed: {type(found).__name__}: {text[:400]}" if not isinstance(found, WorkError) else text
