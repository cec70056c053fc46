"""Two nodes: one decodes, another infers, a third dies under its work; the rows are those of one machine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from serving import batch
from tests.serving.reading import read_parts

Score = Callable[..., pa.Table]


def test_one_node_decodes_another_infers_and_one_dies(
    bundle: Path, images: Path, score_here: Score, tmp_path: Path
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    output = tmp_path / "out"
    # A GPU is only a name to Ray: it sends those who ask for one to the nodes that say they have it.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
    doomed = cluster.add_node(num_cpus=1, num_gpus=1)
    cluster.add_node(num_cpus=1, num_gpus=1)
    flags = ["--engine", str(bundle), "--input", str(images), "--output", str(output), "--batch-size", "8"]
    flags += [
        "--shard-size",
        "8",
        "--decode-cpus",
        "1",
        "--cpus-per-worker",
        "1",
        "--num-gpus",
        "1",
        "--provider",
        "cpu",
    ]
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        killed = threading.Event()

        def kill() -> None:
            while len(read_parts(output)) < 2:
                time.sleep(0.02)
            cluster.remove_node(doomed, allow_graceful=False)
            killed.set()

        threading.Thread(target=kill, daemon=True).start()
        batch.main(flags)
        assert killed.is_set()
    finally:
        ray.shutdown()
        cluster.shutdown()
    score_here(bundle, images, tmp_path / "here", shard_size=8, provider="cpu")
    assert read_parts(output) == read_parts(tmp_path / "here")
