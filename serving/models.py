"""The engines of a replica: one that is always there, and named ones that are loaded when they are asked for."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from pathlib import Path
from typing import Any

from ray import serve

from pipeline.errors import UsageError
from serving.config import LiveConfig, ServiceConfig
from serving.metrics import Metrics
from serving.predictor import Picture, Predictor

DEFAULT = ""
"""Name of the engine of ``/v1/saliency``."""


class Model:
    """An engine with the batches that form in front of it."""

    def __init__(self, engine: str, *, config: ServiceConfig, metrics: Metrics) -> None:
        self.predictor = Predictor(
            engine, provider=config.provider, threads=config.cpus, max_pixels=config.max_pixels, metrics=metrics
        )

        async def together(pictures: list[Picture]) -> list[Any]:
            return await self.predictor.infer(pictures)

        # Decorated here and not as a method: Serve keeps one queue for each decorated function, and models do not mix.
        self._together: Any = serve.batch(max_batch_size=1, batch_wait_timeout_s=0.0)(together)
        self.configure(config)
        self.predictor.warm_up(config.batch_size)

    def configure(self, live: LiveConfig) -> None:
        self._together.set_max_batch_size(live.batch_size)
        self._together.set_batch_wait_timeout_s(live.batch_wait_ms / 1000)

    async def infer(self, picture: Picture) -> Any:
        """(logits, mask) of a picture, in whatever batch it gets into."""
        return await self._together(picture)


class Models:
    """The models of a replica by name; named ones beyond ``max_models`` make room, the longest unused first."""

    def __init__(self, config: ServiceConfig, metrics: Metrics) -> None:
        self._config, self._metrics = config, metrics
        self._engines = {DEFAULT: config.engine} | config.named_engines()
        self._loaded: OrderedDict[str, Model] = OrderedDict()
        self._lock = asyncio.Lock()
        self.default = Model(config.engine, config=config, metrics=metrics)
        self._publish(self.default)

    @property
    def names(self) -> list[str]:
        return [name for name in self._engines if name != DEFAULT]

    @property
    def stuck(self) -> bool:
        return any(model.predictor.stuck for model in (self.default, *self._loaded.values()))

    async def get(self, name: str) -> Model | None:
        """The model of a name, loaded if it was not; None when there is no such name."""
        if name == DEFAULT:
            return self.default
        if name not in self._engines:
            return None
        async with self._lock:
            if name not in self._loaded:
                model = await asyncio.to_thread(Model, self._engines[name], config=self._config, metrics=self._metrics)
                while len(self._loaded) >= self._config.max_models:
                    self._loaded.popitem(last=False)[1].predictor.close()
                self._loaded[name] = model
                self._publish(model)
            self._loaded.move_to_end(name)
            return self._loaded[name]

    def configure(self, config: ServiceConfig) -> None:
        """Take over live settings."""
        self._config = config
        for model in (self.default, *self._loaded.values()):
            model.configure(config)

    def _publish(self, model: Model) -> None:
        info = model.predictor.info
        self._metrics.set_engine(sha256=info.sha256, kind=info.kind, provider=info.provider)
        if model is self.default:
            self._metrics.set_reference(_reference(self._config, info.manifest))


def _reference(config: ServiceConfig, manifest: dict[str, Any]) -> dict[str, Any]:
    """Mask statistics of the training images: in the manifest of an engine that carries them, or in a bundle."""
    if manifest.get("mask_statistics"):
        return manifest["mask_statistics"]
    bundle = Path(config.reference or config.engine)
    if not bundle.is_dir():
        return {}
    from pipeline.bundle import read_spec

    try:
        return read_spec(bundle).mask_statistics
    except UsageError:
        return {}
