"""How much of an engine's speed a whole batch job keeps.

    python -m tests.benchmarks.scoring_speed --images DIR --engine A.onnx [--engine B.onnx ...] [--threads 2] [--out result.json]

For each engine, on the same images with the same number of threads, `--rounds` times in turn (so that a noisy machine
disturbs all alike; medians count):

* `decode`: decoding and fitting alone, in as many threads, of a third of the images;
* `engine`: inference alone, on decoded images, as many;
* `loop`: a plain single-process loop: decode a batch in the same threads, infer, make rows;
* `job`: `serving.batch`, images over the time from the first worker's beginning to the end;
* `command`: the same over the whole command, the start of Python, Ray and the engine included: some ten seconds, whatever
  the number of images.

`job/loop` has to be at least 0.9 and `job/bound` at least 0.85, where the bound is the slower of `decode` and `engine`; exits
1 otherwise.  Where decoding and the engine share the cores, no schedule exceeds `1 / (1/decode + 1/engine)`, which is printed
as `shared_bound`.  `--seconds` makes a measurement of a fast engine as long as one of a slow engine, and shards are as large
as those of a set of 20,000 images: a short job with small shards would show beginnings and ends only.  On few cores Ray's own
processes still start while the first images are scored, which costs a job of less than a minute some per cent.
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

LEAST_OF_LOOP, LEAST_OF_BOUND = 0.9, 0.85


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--engine", required=True, action="append", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--shard-size", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=60, help="about so long is one measurement of an engine")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    result = {}
    for engine in flags.engine:
        result[engine.name] = measure(engine, flags)
        print(engine.name, json.dumps(result[engine.name]), file=sys.stderr)  # all of them take their time
    print(json.dumps(result, indent=1))
    if flags.out:
        flags.out.write_text(json.dumps(result, indent=1))
    good = all(of["job/loop"] >= LEAST_OF_LOOP and of["job/bound"] >= LEAST_OF_BOUND for of in result.values())
    sys.exit(0 if good else 1)


def measure(path: Path, flags: argparse.Namespace) -> dict[str, Any]:
    engine = open_engine(path, threads=flags.threads)
    info = engine.info
    decoder = Decoder(DecoderConfig(size=info.input_size, geometry=info.geometry, threads=flags.threads))
    found = [flags.images / path for path in list_images(flags.images).paths]
    good = [name for name in found if decodes(decoder, name)]
    batch = [decoder.see(good[k % len(good)].read_bytes()) for k in range(flags.batch_size)]
    pixels = np.stack([seen.pixels for seen in batch])
    engine.infer(pixels)
    batches = max(8, round(flags.seconds / min(timed(lambda: engine.infer(pixels)) for _ in range(5))))
    count = batches * flags.batch_size
    names = [good[k % len(good)] for k in range(count)]
    part = max(1, batches // 3)

    def decode() -> None:
        with ThreadPoolExecutor(flags.threads, initializer=single_threaded) as pool:
            for _ in pool.map(lambda name: decoder.see(name.read_bytes()), names[: part * flags.batch_size]):
                pass

    def infer() -> None:
        for _ in range(part):
            engine.infer(pixels)

    def loop() -> None:
        with ThreadPoolExecutor(flags.threads, initializer=single_threaded) as pool:
            for start in range(0, count, flags.batch_size):
                some = names[start : start + flags.batch_size]
                score(engine, list(pool.map(lambda name: decoder.see(name.read_bytes()), some)))

    rates: dict[str, list[float]] = {name: [] for name in ("decode", "engine", "loop", "job", "command")}
    for _ in range(flags.rounds):
        for name, call, images in (
            ("decode", decode, part * flags.batch_size),
            ("engine", infer, part * flags.batch_size),
            ("loop", loop, count),
        ):
            rates[name].append(images / timed(call))
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
        "command/loop": round(median["command"] / median["loop"], 3),
        "shared_bound/bound": round(shared / bound, 3),
        "threads": flags.threads,
        "batch_size": flags.batch_size,
        "images": count,
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
        command += ["--workers", "1", "--cpus-per-worker", str(flags.threads), "--shard-size", str(flags.shard_size)]
        seconds = timed(
            lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) and None
        )
        (record,) = Ledger(f"{folder}/out").jobs()
    assert record.images_per_second
    return {"job": record.images_per_second, "command": len(names) / seconds}


if __name__ == "__main__":
    main()
