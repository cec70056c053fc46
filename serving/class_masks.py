"""Engines that give the masks of several classes of one image: graphs of ``export.onnx --topk``, and bundles."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from export.engine import Engine, as_soft_mask, open_engine
from pipeline.errors import UsageError
from serving.rows import Answers


def open_with_masks(engine: str, *, topk: int, provider: str, threads: int) -> Engine:
    """`export.engine.open_engine` for an engine that gives the masks of the ``topk`` best classes, 0 for none.

    Raises:
        UsageError: it cannot be used, or does not give them.
    """
    path = Path(engine)
    if topk and path.is_dir():
        from export.engine import torch_device
        from export.graph import GraphConfig
        from export.torch_engine import TorchEngine

        return TorchEngine(path, device=torch_device(provider), threads=threads, config=GraphConfig(topk=topk))  # type: ignore[arg-type]
    opened = open_engine(path, provider=provider, threads=threads)  # type: ignore[arg-type]
    given = {port["name"]: port["shape"] for port in opened.info.manifest.get("outputs", ())}
    classes = int(given["topk_labels"][1]) if "topk_labels" in given else 0
    if topk > classes:
        has = f"gives the masks of {classes} classes" if classes else "gives the mask of the predicted class only"
        raise UsageError(f"--topk {topk}: {engine} {has}; export it with 'python -m export.onnx --topk {topk}'")
    return opened


def ask(engine: Engine, images: np.ndarray, *, topk: int) -> Answers:
    """``images``: (N, S, S, 3) uint8 RGB, fitted to the input."""
    if not topk:
        logits, masks = engine.infer(images)
        return Answers(logits=logits, masks=masks)
    outputs = engine.outputs(images)
    return Answers(
        logits=outputs["logits"].astype(np.float32, copy=False),
        masks=as_soft_mask(outputs["mask"]),
        labels=outputs["topk_labels"][:, :topk],
        class_masks=as_soft_mask(outputs["topk_masks"][:, :topk]),
    )
