"""What the gate and the exporters share: which images, which graph, which bundle, and the verdict in words."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

from export.engine import (
    PLAN_SUFFIXES,
    Engine,
    EngineInfo,
    OnnxEngine,
    default_threads,
    open_engine,
)
from export.files import file_sha256
from export.gate import Verdict
from export.gate_images import GateImages
from export.gpu import gpus
from export.session import Provider, precision_of
from pipeline.bundle import Bundle
from pipeline.errors import UsageError


def compiled_graph(plan: Path) -> Path:
    """Where the ONNX graph is that a plan was compiled from: `model.plan.onnx` beside `model.plan`."""
    return plan.with_name(plan.name + ".onnx")


def open_runnable(path: Path, *, provider: Provider, threads: int | None) -> tuple[Engine, list[str]]:
    """Open what can be run of an engine here, and what has to be said about it.

    A plan runs on a GPU only: without one the very graph that it was compiled from stands in for it.  ONNX Runtime has
    no bf16 convolution on the CPU: there the rounding is emulated.

    Raises:
        UsageError: nothing of it can be run here.
    """
    notes = []
    if path.suffix in PLAN_SUFFIXES and path.exists() and not gpus():
        from export.plan_engine import check_file

        graph, manifest = compiled_graph(path), check_file(path)
        if not graph.is_file() or manifest.onnx_sha256 != file_sha256(graph):
            raise UsageError(
                f"{path} needs an NVIDIA GPU, and the graph {graph.name} that it was compiled from is not beside it; "
                f"run this on a machine with a GPU, or build again with '{manifest.rebuild}'"
            )
        notes.append(
            f"no GPU here: judged {graph.name}, the very graph that {path.name} was compiled from, in ONNX Runtime"
        )
        path = graph
    if path.suffix == ".onnx" and path.is_file() and precision_of(path) == "bf16" and not gpus():
        import onnx

        from export.lowering import emulate

        notes.append("bf16 was emulated: weights and every node's results rounded to bf16")
        data = emulate(onnx.load(path), "bf16").SerializeToString()
        return OnnxEngine(path, provider="cpu", threads=threads or default_threads(), data=data), notes
    return open_engine(path, provider=provider, threads=threads), notes


def matching_bundle(info: EngineInfo, bundle: Bundle) -> None:
    """Make sure that the engine was made from this bundle.

    Raises:
        UsageError: it was not.
    """
    if info.bundle_sha256 != bundle.sha256:
        raise UsageError(
            f"{info.path} was made from the bundle {info.bundle_sha256[:12]}, but {bundle.path} is "
            f"{bundle.sha256[:12]}; give the right --model, or export this one"
        )


def hard_masks(bundle: Bundle) -> bool:
    """Whether the masker's masks hold only 0 and 1."""
    return bundle.spec.masker.binary


def verdict_lines(verdict: Verdict, images: GateImages, notes: list[str]) -> list[str]:
    """The verdict in a few lines."""
    figures = verdict.figures
    lines = [f"note: {note}" for note in notes]
    state = "passed" if verdict.passed else "FAILED"
    lines.append(f"parity on {figures['n_images']} images of {images.source}: {state}")
    if not verdict.columns:
        return lines
    ties = (
        ""
        if figures["top1_strict_agreement"] == figures["top1_agreement"]
        else (f" ({figures['top1_agreement']:.4f} where the reference's first two are not alike)")
    )
    lines.append(
        f"  logits max |d| {figures['logits_max_abs']:.3g} ({figures['logits_max_rel']:.3g} of their deviation), "
        f"top-1 agreement {figures['top1_strict_agreement']:.4f}{ties}"
    )
    lines.append(
        f"  mask max |d| {figures['mask_max_abs']:.3g}, mean |d| {figures['mask_mean_abs']:.3g}, "
        f"IoU at the mean {figures['mask_iou']:.4f}, rank correlation {figures['rank_correlation']:.4f}"
    )
    changes = [f"{name} {figures[name]:+.4f}" for name in ("dLE", "dOM", "dF1") if name in figures]
    if changes:
        lines.append(f"  {', '.join(changes)} on {figures['n_boxes']} images with boxes")
    batch = figures["batch"]
    lines.append(
        f"  batches of {', '.join(batch['equal_rows'])}: equal rows differ by {max(batch['equal_rows'].values()):.2g}, "
        f"sizes by {max(batch['by_size'].values(), default=0.0):.2g}"
    )
    if "sizes" in figures:
        worst = max(apart["mask_max_abs"] for apart in figures["sizes"].values())
        lines.append(f"  images of {', '.join(figures['sizes'])}: masks differ by {worst:.2g} at most")
    return lines


@contextmanager
def progress_bar(total: int, label: str):
    """A bar on stderr that goes away when done; yields the function that advances it."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="img", leave=False, file=sys.stderr, disable=None) as bar:
        yield bar.update
