"""A bundle in torch behind the `Engine` interface: the reference that the parity gate measures others against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from export.engine import EngineInfo, as_soft_mask, checked, checked_tensor
from export.graph import DeployableGraph, GraphConfig
from pipeline.bundle import Bundle, load_bundle


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
        return {name: value.cpu().numpy() for name, value in self._run(pixels.to(self._device)).items()}

    def tensors(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `export.engine.Engine.tensors`."""
        return self._run(checked_tensor(images, self.info))

    @torch.inference_mode()
    def _run(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self._graph.config.output_names, self._graph(pixels), strict=True))
