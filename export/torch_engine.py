"""A bundle in torch behind the `Engine` interface: the reference that the parity gate measures others against."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.engine import EngineInfo, as_soft_mask, checked, checked_tensor
from export.graph import DeployableGraph, GraphConfig
from pipeline.bundle import Bundle, load_bundle

_FLAGS = threading.Lock()


@contextmanager
def exact_float32() -> Iterator[None]:
    """float32 as float32 within: torch lets a GPU convolve in TF32, with 10 bits of mantissa, unless it is told not to.

    The flags are the process's, and have their values again afterwards; a kernel takes what holds when it is launched.
    One thread at a time: the one that ends first would give the flags back under the other.  Not around an export, in
    which torch asks for its older flags, and refuses to tell them while the newer ones say something else.
    """
    convolution: Any = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
    product = torch.backends.cuda.matmul
    with _FLAGS:
        before = convolution.fp32_precision, product.fp32_precision
        convolution.fp32_precision = product.fp32_precision = "ieee"
        try:
            yield
        finally:
            convolution.fp32_precision, product.fp32_precision = before


class TorchEngine:
    """The deployable graph of a bundle, run by torch."""

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        bundle: Bundle | None = None,
        config: GraphConfig | None = None,
    ) -> None:
        """``bundle``: that of ``path`` where it is loaded already; ``config``: options other than the default ones."""
        if threads:
            torch.set_num_threads(threads)
        bundle = bundle or load_bundle(path)
        self._device = torch.device(device)
        self._graph = DeployableGraph(model=bundle.model, spec=bundle.spec, config=config).eval().to(self._device)
        spec = bundle.spec
        self.info = EngineInfo(
            path=str(path),
            sha256=bundle.sha256,
            kind="torch",
            provider=device,
            input_size=spec.input_size,
            mask_size=spec.mask_size,
            geometry=spec.geometry,
            class_names=spec.class_names,
            mean=spec.mean,
            std=spec.std,
            precision="fp32",
            max_batch=None,
            bundle_sha256=bundle.sha256,
            manifest={},
            any_size=self._graph.config.resize or self._graph.config.dynamic_size,
        )

    def infer(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `export.engine.Engine.infer`."""
        outputs = self.outputs(images)
        return outputs["logits"], as_soft_mask(outputs["mask"])

    def outputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """See `export.engine.Engine.outputs`."""
        pixels = torch.from_numpy(np.require(checked(images, self.info), requirements="W"))
        if self._device.type == "cpu":
            return {name: value.numpy() for name, value in self._run(pixels).items()}
        found = self._run(pixels.pin_memory().to(self._device, non_blocking=True))
        return {name: _through_pinned(value).numpy() for name, value in found.items()}

    def tensors(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `export.engine.Engine.tensors`."""
        gpu = next(self._graph.parameters()).device.index
        return self._run(checked_tensor(images, self.info, gpu))

    @torch.inference_mode()
    def _run(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        with nullcontext() if self._device.type == "cpu" else exact_float32():  # a CPU has no other float32
            return dict(zip(self._graph.config.output_names, self._graph(pixels), strict=True))


def _through_pinned(value: torch.Tensor) -> torch.Tensor:
    """A tensor of a GPU in the host's memory, which is not pinned itself: a caller may keep any number of results."""
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value).clone()
