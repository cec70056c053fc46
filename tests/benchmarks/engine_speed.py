"""Images per second of every runtime and precision, with the mask and without, against what the card can do at all.

    python -m tests.benchmarks.engine_speed [--init resnet50] [--image-size 224] [--batch 1,64,256] [--out result.json]

Made for a GPU; with ``--device cpu`` everything that a CPU runs is run, to try the script.  Random weights, as only
time is measured.  Images lie on the device and answers stay there, so that the network is what is timed; one row has
the copies of pinned memory both ways as well, and rows "through the host" are `Engine.outputs`, as a program calls it:
arrays in, arrays out.  Contestants: torch in float32 (no TF32), torch and torch.compile in bfloat16, ONNX Runtime and
TensorRT(-RTX) in fp32, fp16, bf16, int8 and fp8; each with the mask and as the plain classifier, which is the same
graph cut at the logits.  What cannot run is in the result with its error.  Ceilings: the largest of a few matrix
products in bfloat16, and copies from pinned memory.  ``share_of_matrix_peak``: the network's multiply-adds times two,
times images per second, over that; ``share_of_copies``: the same of the images that the copies alone could bring.
``mask_costs``: time with the mask over time without.  The gate of `export.parity` judges the answers of the same
engines, and of torch in bfloat16; the script exits with 1 when it fails one of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from onnx.utils import Extractor
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from export import onnx as export_onnx
from export import precision as export_precision
from export import trt as export_trt
from export.backend import load_backend
from export.build import BuildConfig, build, parse_profile
from export.engine import Engine, OnnxEngine, default_threads, open_engine
from export.gate import ParityFailure, Thresholds, judge
from export.gate_images import from_noise
from export.gpu import gpus
from export.graph import DeployableGraph
from export.judged import serialise
from export.manifest import METADATA_KEY, Manifest
from export.plan_engine import PlanEngine
from export.torch_engine import TorchEngine
from export.verify import compiled_graph
from pipeline.bundle import Bundle, load_bundle
from tests.benchmarks.explanation_cost import a_bundle

LEAST_RUNS = 5
JUDGED_IMAGES = 16
ALONE, HOST = ", classifier alone", ", through the host"
PRECISIONS = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "int8-tensorrt", "fp8": "fp8"}
"""Of `export.trt`, and what `export.precision` calls them."""
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
    if failed := failures(result):
        sys.exit(f"the gate failed {', '.join(failed)}: their times are of other answers than the bundle's")


def failures(result: dict[str, Any]) -> list[str]:
    """What the gate failed: engines at the end, and exports that were not written because of it."""
    exports = [name for name, reason in result["cannot_run"].items() if reason.startswith(ParityFailure.__name__)]
    return exports + [name for name, verdict in result["gate"].items() if verdict.startswith("failed")]


def measure(flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    a_bundle(flags, folder / "bundle")
    bundle = load_bundle(folder / "bundle")
    size = flags.image_size
    batches = [int(text) for text in flags.batch.split(",")]
    peak = matrix_peak(flags)
    flops = count_flops(bundle, size)
    copies = copy_rates(flags)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if flags.device == "cuda" else "cpu",
        "matrix_peak_tflops": round(peak / 1e12, 3),
        "copy_gb_per_second": copies,
        "gflops_per_image": round(flops / 1e9, 3),
        "images_per_second": {},
        "mask_costs": {},
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
                rates[str(batch)] = {
                    "rate": round(rate, 1),
                    "share_of_matrix_peak": round(rate * flops / peak, 4),
                    "share_of_copies": round(rate * size * size * 3 / (copies["in"] * 1e9), 4),
                }
            result["images_per_second"][name] = rates
        except Exception as error:  # each runtime has errors of its own, and what they say is the result
            result["cannot_run"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    found = result["images_per_second"]
    for name in found:
        if name + ALONE in found:
            result["mask_costs"][name] = {
                batch: round(found[name + ALONE][batch]["rate"] / row["rate"], 3) for batch, row in found[name].items()
            }
    for path in (*(folder / f"{name}.onnx" for name in PRECISIONS), *sorted(folder.glob("*.plan"))):
        result["gate"][path.name] = gate(lambda path=path: opened(path, flags), bundle, flags)
    result["gate"]["torch bf16"] = gate(lambda: InTorch(bundle, flags), bundle, flags)
    return result


def contestants(
    flags: argparse.Namespace, bundle: Bundle, folder: Path, largest: int
) -> dict[str, Callable[[], Answer]]:
    """Name -> what makes the function that is timed."""
    made: dict[str, Callable[[], Answer]] = {
        "torch fp32": lambda: in_torch(bundle, flags, torch.float32),
        "torch fp32" + ALONE: lambda: in_torch(bundle, flags, torch.float32, mask=False),
        "torch bf16": lambda: in_torch(bundle, flags, torch.bfloat16),
        "torch bf16" + ALONE: lambda: in_torch(bundle, flags, torch.bfloat16, mask=False),
        "torch.compile bf16": lambda: torch.compile(in_torch(bundle, flags, torch.bfloat16), dynamic=False),
        "torch.compile bf16" + ALONE: lambda: torch.compile(
            in_torch(bundle, flags, torch.bfloat16, mask=False), dynamic=False
        ),
        "torch bf16, with copies": lambda: with_copies(in_torch(bundle, flags, torch.bfloat16), flags),
        "torch fp32" + HOST: lambda: through_host(TorchEngine(bundle.path, device=flags.device, bundle=bundle)),
    }

    profile = f"1,{min(64, largest)},{largest}"
    for precision in PRECISIONS:
        graph, plan = folder / f"{precision}.onnx", folder / f"{precision}.plan"
        made |= {
            f"onnxruntime {precision}": lambda graph=graph: in_onnxruntime(bundle, graph, flags),
            f"onnxruntime {precision}" + ALONE: lambda graph=graph: alone(graph, flags),
            f"onnxruntime {precision}" + HOST: lambda graph=graph: through_host(opened(graph, flags)),
            f"tensorrt {precision}": lambda plan=plan: in_tensorrt(bundle, plan, profile),
            f"tensorrt {precision}" + ALONE: lambda plan=plan: plan_alone(plan, profile),
            f"tensorrt {precision}" + HOST: lambda plan=plan: through_host(opened(plan, flags)),
        }
    return made


def in_onnxruntime(bundle: Bundle, path: Path, flags: argparse.Namespace) -> Answer:
    """The graph of one precision, exported to ``path``."""
    words = ["--model", str(bundle.path), "--out", str(path), "--parity-images", "4"]
    if path.stem == "fp32":
        export_onnx.main(words)
    else:
        export_precision.main([*words, "--precision", PRECISIONS[path.stem], "--calib-images", "32"])
    return opened(path, flags).tensors


def opened(path: Path, flags: argparse.Namespace) -> Engine:
    """An engine on the device that is measured."""
    return open_engine(path, provider="auto" if path.suffix == ".plan" else flags.device)


def classifier_of(path: Path) -> tuple[onnx.ModelProto, Manifest]:
    """An exported graph cut at the logits, and the manifest that fits it."""
    model = onnx.load(path)
    text = next(entry.value for entry in model.metadata_props if entry.key == METADATA_KEY)
    manifest = Manifest.model_validate_json(text)
    part = Extractor(onnx.shape_inference.infer_shapes(model)).extract_model(["image"], ["logits"])
    return part, manifest.model_copy(update={"outputs": manifest.outputs[:1]})


def alone(path: Path, flags: argparse.Namespace) -> Answer:
    """The classifier of an exported graph in ONNX Runtime."""
    data = serialise(*classifier_of(path))
    return OnnxEngine(path, provider=flags.device, threads=default_threads(), data=data).tensors


def in_tensorrt(bundle: Bundle, path: Path, profile: str) -> Answer:
    """The plan of one precision, built into ``path``."""
    words = ["--model", str(bundle.path), "--out", str(path), "--precision", path.stem, "--parity-images", "4"]
    export_trt.main([*words, "--batch", profile, "--calib-images", "32"])
    return open_engine(path).tensors


def plan_alone(path: Path, profile: str) -> Answer:
    """The classifier of the graph that a plan was compiled from, as a plan of its own."""
    part, manifest = classifier_of(compiled_graph(path))
    backend, config = load_backend("auto"), BuildConfig(profiles=(parse_profile(profile),))
    graph = serialise(part, manifest)
    built = build(graph, backend, config)
    described = export_trt.describe_plan(manifest, graph, built, backend, config)
    return PlanEngine(path, manifest=described, plan=built.plan).tensors


class InTorch(TorchEngine):
    """The bundle in torch in bfloat16, as the engine that the gate wants."""

    def __init__(self, bundle: Bundle, flags: argparse.Namespace) -> None:
        super().__init__(bundle.path, device=flags.device, bundle=bundle)
        self.info = replace(self.info, precision="bf16")
        self._answer = in_torch(bundle, flags, torch.bfloat16)
        self._flags = flags

    def outputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
        found = self._answer(torch.from_numpy(np.ascontiguousarray(images)).to(self._flags.device))
        return dict(zip(("logits", "mask"), (value.float().cpu().numpy() for value in found), strict=True))


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
    """From pinned memory to the device, and the answers back to such; the first call, which warms up, allocates it."""
    pinned = flags.device == "cuda"
    rooms: dict[torch.Size, tuple[Tensor, list[Tensor]]] = {}

    def timed(images: Tensor) -> list[Tensor]:
        if images.shape not in rooms:
            host = torch.empty(images.shape, dtype=images.dtype, pin_memory=pinned).copy_(images)
            answers = [torch.empty(v.shape, dtype=v.dtype, pin_memory=pinned) for v in answer(images)]
            rooms[images.shape] = host, answers
        host, answers = rooms[images.shape]
        for room, value in zip(answers, answer(host.to(flags.device, non_blocking=True)), strict=True):
            room.copy_(value, non_blocking=True)
        return answers

    return timed


def through_host(engine: Engine) -> Answer:
    """`Engine.outputs`, which takes and gives arrays of the host's memory."""
    arrays: dict[torch.Size, np.ndarray] = {}

    def answer(images: Tensor) -> dict[str, np.ndarray]:
        if images.shape not in arrays:
            arrays[images.shape] = images.cpu().numpy()
        return engine.outputs(arrays[images.shape])

    return answer


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


def gate(make: Callable[[], Engine], bundle: Bundle, flags: argparse.Namespace) -> str:
    """The gate's verdict on the answers of an engine: "passed", "failed: ...", or "not run: ..."."""
    try:
        engine = make()
        images = from_noise(flags.image_size, JUDGED_IMAGES)
        reference = TorchEngine(bundle.path, bundle=bundle)
        verdict = judge(reference, engine, images, thresholds=Thresholds.of(engine.info.precision))
    except Exception as error:
        return f"not run: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "passed" if verdict.passed else f"failed: {'; '.join(str(error) for error in verdict.errors[:3])}"


if __name__ == "__main__":
    if gpus():
        print(f"GPU: {gpus()[0].name}", file=sys.stderr)
    main()
