"""What the explanation costs: the exported graph with the mask against the same graph without, and against Grad-CAM.

    python -m tests.benchmarks.explanation_cost [--init resnet50] [--image-size 224] [--rounds 15] [--out result.json]

Random weights, since only time is measured.  Both graphs run in ONNX Runtime on the CPU with the same threads, in turns
whose order changes, on the same images; the plain one is the exported graph cut at the logits.  Threads do not spin after
their work and every turn begins after a pause, or one contestant would pay for the threads of the one before.  Grad-CAM is that of pytorch-grad-cam on the same
classifier in torch, beside one forward of torch with the mask.  Ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.utils import Extractor
from torch import nn

from export.gate_images import from_noise
from export.graph import GraphConfig
from export.source import from_bundle
from export.trace import DEFAULT_OPSET
from pipeline.backbone import choose_taps, create_classifier, pyramid, tap_classifier
from pipeline.bundle import load_bundle, save_bundle
from pipeline.masker import default_mask_size
from pipeline.model import SaliencyModel, build_masker
from pipeline.planning import parse_init
from pipeline.spec import BackboneSpec, MaskerSpec, ModelSpec

CLASSES = 1000
MOST = 1.05
"""Times that the graph with the mask may take of the plain one's; exits 1 beyond."""
PAUSE = 0.3
"""Seconds before a turn: OpenMP's threads spin for 0.2 after torch's work."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", default="1,16", help="batch sizes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    with TemporaryDirectory() as folder:
        result = measure(flags, Path(folder))
    print(json.dumps(result, indent=1))
    if flags.out:
        flags.out.write_text(json.dumps(result, indent=1) + "\n")
    if max(ratios["graph_with_mask/plain_graph"] for ratios in result.values()) > MOST:
        raise SystemExit(f"the graph with the mask takes more than {MOST} times as long as the plain one")


def measure(flags: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    model, classifier = a_bundle(flags, folder / "bundle")
    with_mask, plain = graphs(folder / "bundle", flags.threads)
    random = np.random.default_rng(0)
    result: dict[str, dict[str, float]] = {}
    for batch in (int(text) for text in flags.batch.split(",")):
        images = random.integers(0, 256, (batch, flags.image_size, flags.image_size, 3), dtype=np.uint8)
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        names = [output.name for output in with_mask.get_outputs()]
        a, b = with_mask.run(["logits"], {"image": images})[0], plain.run(["logits"], {"image": images})[0]
        assert np.allclose(a, b, atol=1e-4), "the two graphs classify alike"
        contestants: dict[str, Callable[[], object]] = {
            "plain_graph": lambda images=images: plain.run(["logits"], {"image": images}),
            "graph_with_mask": lambda images=images, names=names: with_mask.run(names, {"image": images}),
            "torch_with_mask": lambda x=x: forward(model, x),
            "grad_cam": grad_cam(classifier, x),
        }
        times = in_turns(contestants, flags.rounds)
        result[f"batch {batch}"] = {
            "graph_with_mask/plain_graph": ratio(times, "graph_with_mask", "plain_graph"),
            "grad_cam/torch_with_mask": ratio(times, "grad_cam", "torch_with_mask"),
            "grad_cam/graph_with_mask": ratio(times, "grad_cam", "graph_with_mask"),
        }
    return result


def a_bundle(flags: argparse.Namespace, path: Path) -> tuple[SaliencyModel, nn.Module]:
    """A model with random weights as a bundle in ``path``, and its classifier as its library makes it."""
    torch.manual_seed(0)
    source, name = parse_init(flags.init)
    classifier = create_classifier(source, name, outputs=CLASSES, arguments={})
    network = copy.deepcopy(classifier).eval()
    maps = pyramid(source, classifier, flags.image_size)
    taps = choose_taps(maps, None)
    backbone = tap_classifier(source, classifier, taps, last_map=maps[-1].module)
    mask_size = default_mask_size(flags.image_size)
    masker = build_masker(MaskerSpec(), backbone, mask_size=mask_size, classes=CLASSES)
    spec = ModelSpec(
        backbone=BackboneSpec(source=source, name=name, outputs=CLASSES, taps=taps),  # pyright: ignore[reportArgumentType]
        masker=MaskerSpec(),
        preset="fix",
        input_size=flags.image_size,
        mask_size=mask_size,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        class_names=[str(k) for k in range(CLASSES)],
        data_classes=["a"],
        class_index=[0],
    )
    samples = from_noise(flags.image_size, 32).images  # to calibrate on
    save_bundle(path, SaliencyModel(backbone=backbone, masker=masker), spec, samples)
    return load_bundle(path).model, network


def graphs(bundle: Path, threads: int) -> tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession]:
    """Sessions of the exported graph, and of its part from the image to the logits."""
    whole: onnx.ModelProto = from_bundle(
        load_bundle(bundle), config=GraphConfig(), opset=DEFAULT_OPSET, rebuild=""
    ).model
    part = Extractor(onnx.shape_inference.infer_shapes(whole)).extract_model(["image"], ["logits"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    sessions = [
        onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for graph in (whole, part)
    ]
    return sessions[0], sessions[1]


@torch.no_grad()
def forward(model: SaliencyModel, x: torch.Tensor) -> object:
    return model(x)


def grad_cam(network: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """Grad-CAM of the predicted class at the classifier's deepest map."""
    from pytorch_grad_cam import GradCAM

    layers = [module for name, module in network.named_modules() if name == "layer4"]
    layers = layers or [m for m in network.modules() if isinstance(m, nn.Conv2d)][-1:]
    cam = GradCAM(model=network, target_layers=layers)
    return lambda: cam(input_tensor=x, targets=None)  # the class with the highest answer


def in_turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, call in list(contestants.items())[:: 1 if number % 2 else -1]:
            time.sleep(PAUSE)
            started = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - started)
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """Median over the rounds of one time over another."""
    return round(statistics.median(a / b for a, b in zip(times[above], times[below], strict=True)), 3)


if __name__ == "__main__":
    main()
