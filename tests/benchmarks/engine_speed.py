"""Images per second of every runtime and precision, with the mask and without, against what the card can do at all.

    python -m tests.benchmarks.engine_speed [--init resnet50] [--image-size 224] [--batch 1,64,256] [--out result.json]

Made for a GPU; with ``--device cpu`` everything that a CPU runs is run, to try the script.  Random weights, since only time
is measured.  Images lie on the device and answers stay there, so that the network is what is timed; one row has the copies
of pinned memory both ways as well.  Contestants: torch in float32 (no TF32), torch and torch.compile in bfloat16, ONNX
Runtime and TensorRT(-RTX) in fp32, fp16 and int8.  What cannot run is in the result with its error.  Ceilings: the largest
of a few matrix products in bfloat16, and copies from pinned memory.  ``share_of_matrix_peak``: the network's multiply-adds
times two, times images per second, over that.  The gate of `export.parity` judges the answers of the same engines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from export import onnx as export_onnx
from export import trt as export_trt
from export.engine import Engine, open_engine
from export.gate import Thresholds, judge
from export.gate_images import from_noise
from export.gpu import gpus
from export.graph import DeployableGraph
from export.torch_engine import TorchEngine
from pipeline.bundle import Bundle, load_bundle
from tests.benchmarks.explanation_cost import a_bundle

LEAST_RUNS = 5
JUDGED_IMAGES = 16
Answer = Callable[[Tensor], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", default="1,64,256", help="batch sizes")
    parser.add_argument("--seconds", type=float, default=2.0, help="time of each contestant at each batch size")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    if flags.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --device cpu tries the script")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with TemporaryDirectory() as folder:
        result = measure(flags, Path(folder))
    print(json.dumps(result, indent=1))
    if flags.out:
        flags.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    a_bundle(flags, folder / "bundle")
    bundle = load_bundle(folder / "bundle")
    size = flags.image_size
    batches = [int(text) for text in flags.batch.split(",")]
    peak = matrix_peak(flags)
    flops = count_flops(bundle, size)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if flags.device == "cuda" else "cpu",
        "matrix_peak_tflops": round(peak / 1e12, 3),
        "copy_gb_per_second": copy_rates(flags),
        "gflops_per_image": round(flops / 1e9, 3),
        "images_per_second": {},
        "cannot_run": {},
        "gate": {},
    }
    for name, make in contestants(flags, bundle, folder, max(batches)).items():
        try:
            answer = make()
            rates = {}
            for batch in batches:
                images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=flags.device)
                rate = batch / seconds_of(lambda answer=answer, images=images: answer(images), flags)
                rates[str(batch)] = {"rate": round(rate, 1), "share_of_matrix_peak": round(rate * flops / peak, 4)}
            result["images_per_second"][name] = rates
        except Exception as error:  # each runtime has errors of its own, and what they say is the result
            result["cannot_run"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    for path in (*folder.glob("model.onnx"), *sorted(folder.glob("*.plan"))):
        result["gate"][path.name] = gate(path, bundle, flags)
    return result


def contestants(
    flags: argparse.Namespace, bundle: Bundle, folder: Path, largest: int
) -> dict[str, Callable[[], Answer]]:
    """Name -> what makes the function that is timed."""
    made: dict[str, Callable[[], Answer]] = {
        "torch fp32": lambda: in_torch(bundle, flags, torch.float32),
        "torch fp32, classifier alone": lambda: in_torch(bundle, flags, torch.float32, mask=False),
        "torch bf16": lambda: in_torch(bundle, flags, torch.bfloat16),
        "torch bf16, classifier alone": lambda: in_torch(bundle, flags, torch.bfloat16, mask=False),
        "torch.compile bf16": lambda: torch.compile(in_torch(bundle, flags, torch.bfloat16), dynamic=False),
        "torch.compile bf16, classifier alone": lambda: torch.compile(
            in_torch(bundle, flags, torch.bfloat16, mask=False), dynamic=False
        ),
        "torch bf16, with copies": lambda: with_copies(in_torch(bundle, flags, torch.bfloat16), flags),
    }

    def in_onnxruntime() -> Answer:
        path = folder / "model.onnx"
        export_onnx.main(["--model", str(bundle.path), "--out", str(path), "--parity-images", "4"])
        return open_engine(path, provider=flags.device).tensors

    def in_tensorrt(precision: str) -> Answer:
        path = folder / f"{precision}.plan"
        words = ["--model", str(bundle.path), "--out", str(path), "--precision", precision, "--parity-images", "4"]
        export_trt.main([*words, "--batch", f"1,{min(64, largest)},{largest}", "--calib-images", "32"])
        return open_engine(path).tensors

    made["onnxruntime fp32"] = in_onnxruntime
    for precision in ("fp32", "fp16", "int8"):
        made[f"tensorrt {precision}"] = lambda precision=precision: in_tensorrt(precision)
    return made


def in_torch(bundle: Bundle, flags: argparse.Namespace, dtype: torch.dtype, *, mask: bool = True) -> Answer:
    """The deployable graph, or its classifier, in torch; lower precision by autocast."""
    graph = DeployableGraph(model=bundle.model, spec=bundle.spec).eval().to(flags.device)
    graph = graph.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @torch.no_grad()
    def answer(images: Tensor) -> Any:
        with torch.autocast(flags.device, dtype, enabled=dtype != torch.float32):
            if mask:
                return graph(images)
            return graph.model.backbone(images.float().permute(0, 3, 1, 2) * graph.scale + graph.shift).logits

    return answer


def with_copies(answer: Answer, flags: argparse.Namespace) -> Answer:
    """From pinned memory to the device, and the answers back."""

    def timed(images: Tensor) -> Any:
        host = images.cpu()
        host = host.pin_memory() if flags.device == "cuda" else host
        return [value.float().cpu() for value in answer(host.to(flags.device, non_blocking=True))]

    return timed


def seconds_of(call: Callable[[], object], flags: argparse.Namespace) -> float:
    """Median of at least `LEAST_RUNS` runs, after two to warm up."""
    times: list[float] = []
    until = None
    while until is None or len(times) < LEAST_RUNS + 2 or time.perf_counter() < until:
        started = time.perf_counter()
        call()
        if flags.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        until = until or time.perf_counter() + flags.seconds
    return statistics.median(times[2:])


def matrix_peak(flags: argparse.Namespace) -> float:
    """Most floating-point operations per second of a square product in bfloat16."""
    best = 0.0
    for side in (4096, 8192) if flags.device == "cuda" else (512,):
        a, b = (torch.randn(side, side, device=flags.device, dtype=torch.bfloat16) for _ in range(2))
        best = max(best, 2 * side**3 / seconds_of(lambda a=a, b=b: a @ b, flags))
    return best


def copy_rates(flags: argparse.Namespace) -> dict[str, float]:
    """GB/s from pinned memory to the device and back."""
    host = torch.empty(1 << 28 if flags.device == "cuda" else 1 << 24, dtype=torch.uint8)
    host = host.pin_memory() if flags.device == "cuda" else host
    there = torch.empty_like(host, device=flags.device)
    size = host.numel() / 1e9
    return {
        "in": round(size / seconds_of(lambda: there.copy_(host, non_blocking=True), flags), 2),
        "out": round(size / seconds_of(lambda: host.copy_(there, non_blocking=True), flags), 2),
    }


def count_flops(bundle: Bundle, size: int) -> float:
    """Floating-point operations of one image, classifier and mask."""
    graph = DeployableGraph(model=bundle.model, spec=bundle.spec).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        graph(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    return float(counter.get_total_flops())


def gate(path: Path, bundle: Bundle, flags: argparse.Namespace) -> str:
    """The gate's verdict on the answers of an engine, where it runs."""
    try:
        engine: Engine = open_engine(path, provider="auto" if path.suffix == ".plan" else flags.device)
        images = from_noise(flags.image_size, JUDGED_IMAGES)
        reference = TorchEngine(bundle.path, bundle=bundle)
        verdict = judge(reference, engine, images, thresholds=Thresholds.of(engine.info.precision))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "passed" if verdict.passed else "; ".join(str(error) for error in verdict.errors[:3])


if __name__ == "__main__":
    if gpus():
        print(f"GPU: {gpus()[0].name}", file=sys.stderr)
    main()
