"""How much of an engine's speed a whole batch job keeps.

    python -m tests.benchmarks.scoring_speed --images DIR --engine A.onnx [--engine B.onnx ...] [--threads 2] [--out result.json]

For each engine, on the same images with the same number of threads, `--rounds` times in turn (so that a noisy machine
disturbs all alike; medians count):

* `decode`: decoding and fitting alone, in as many threads;
* `engine`: inference alone, on decoded images;
* `loop`: a plain single-process loop, decode a batch, infer, make rows;
* `job`: `serving.batch`, images over the time from the first worker's beginning to the end, and over the whole command.

`job/loop` has to be at least 0.9, `job/bound` at least 0.85, where the bound is the slower of `decode` and `engine`.  Where
decoding and the engine share the cores, no schedule exceeds `1 / (1/decode + 1/engine)`, which is printed as `shared_bound`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from export.engine import Engine, open_engine
from pipeline.data.decode import ImageError
from pipeline.data.listing import list_images
from serving.decoder import Decoder, DecoderConfig, single_threaded
from serving.ledger import Ledger
from serving.rows import Seen, scored_row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--engine", required=True, action="append", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--count", type=int, default=512, help="images in one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    result = {engine.name: measure(engine, flags) for engine in flags.engine}
    print(json.dumps(result, indent=1))
    if flags.out:
        flags.out.write_text(json.dumps(result, indent=1))


def measure(path: Path, flags: argparse.Namespace) -> dict[str, Any]:
    engine = open_engine(path, threads=flags.threads)
    info = engine.info
    decoder = Decoder(DecoderConfig(size=info.input_size, geometry=info.geometry, threads=flags.threads))
    found = [flags.images / path for path in list_images(flags.images).paths]
    good = [name for name in found if decodes(decoder, name)]
    names = [good[k % len(good)] for k in range(flags.count)]
    batch = [decoder.see(name.read_bytes()) for name in names[: flags.batch_size]]
    pixels = np.stack([seen.pixels for seen in batch])
    engine.infer(pixels)

    def decode() -> None:
        with ThreadPoolExecutor(flags.threads, initializer=single_threaded) as pool:
            for _ in pool.map(lambda name: decoder.see(name.read_bytes()), names):
                pass

    def infer() -> None:
        for _ in range(0, flags.count, flags.batch_size):
            engine.infer(pixels)

    def loop() -> None:
        for start in range(0, flags.count, flags.batch_size):
            score(engine, [decoder.see(name.read_bytes()) for name in names[start : start + flags.batch_size]])

    rates: dict[str, list[float]] = {name: [] for name in ("decode", "engine", "loop", "job", "command")}
    for _ in range(flags.rounds):
        for name, call in (("decode", decode), ("engine", infer), ("loop", loop)):
            rates[name].append(flags.count / timed(call))
        for name, rate in job(path, names, flags).items():
            rates[name].append(rate)
    median = {name: round(statistics.median(values), 2) for name, values in rates.items()}
    bound = min(median["decode"], median["engine"])
    shared = 1 / (1 / median["decode"] + 1 / median["engine"])
    return {
        "images_per_second": median,
        "rounds": {name: [round(value, 2) for value in values] for name, values in rates.items()},
        "job/loop": round(median["job"] / median["loop"], 3),
        "job/bound": round(median["job"] / bound, 3),
        "shared_bound/bound": round(shared / bound, 3),
        "threads": flags.threads,
        "batch_size": flags.batch_size,
        "count": flags.count,
    }


def decodes(decoder: Decoder, name: Path) -> bool:
    try:
        decoder.see(name.read_bytes())
    except ImageError:
        return False
    return True


def score(engine: Engine, batch: list[Seen]) -> None:
    logits, masks = engine.infer(np.stack([seen.pixels for seen in batch]))
    for k, seen in enumerate(batch):
        scored_row("", seen, logits[k], masks[k], class_names=engine.info.class_names, engine="")


def timed(call: Callable[[], None]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def job(engine: Path, names: list[Path], flags: argparse.Namespace) -> dict[str, float]:
    with TemporaryDirectory() as folder:
        listing = Path(folder) / "list.txt"
        listing.write_text("".join(f"{name.absolute()}\n" for name in names))
        command = [sys.executable, "-m", "serving.batch", "--engine", str(engine), "--input", str(listing)]
        command += ["--output", f"{folder}/out", "--batch-size", str(flags.batch_size)]
        command += ["--workers", "1", "--cpus-per-worker", str(flags.threads)]
        seconds = timed(
            lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) and None
        )
        (record,) = Ledger(f"{folder}/out").jobs()
    assert record.images_per_second
    return {"job": record.images_per_second, "command": flags.count / seconds}


if __name__ == "__main__":
    main()
