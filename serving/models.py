"""The engines of a replica: one that is always there, and named ones that are loaded when they are asked for."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from serving.config import LiveConfig, ServiceConfig
from serving.gathering import Gathering
from serving.metrics import Metrics
from serving.predictor import Picture, Predictor

DEFAULT = ""
"""Name of the engine of ``/v1/saliency``."""


class Model:
    """An engine with the batches that form in front of it."""

    def __init__(self, engine: str, *, config: ServiceConfig, metrics: Metrics) -> None:
        self.predictor = Predictor(
            engine, provider=config.provider, threads=config.cpus, max_pixels=config.max_pixels, metrics=metrics,
            watched=engine == config.engine,  # whose reference is published
        )  # fmt: skip
        self._together = Gathering(self.predictor.infer)
        self._set(config)
        self.predictor.warm_up(1)
        self.predictor.warm_up(config.batch_size)
        self._warm = config.batch_size

    async def configure(self, live: LiveConfig) -> None:
        """Take over live settings; a batch of the new size is run before a request waits for one."""
        if live.batch_size != self._warm:
            await asyncio.to_thread(self.predictor.warm_up, live.batch_size)
            self._warm = live.batch_size
        self._set(live)

    def _set(self, live: LiveConfig) -> None:
        self._together.batch_size = live.batch_size
        self._together.wait_s = live.batch_wait_ms / 1000

    async def infer(self, picture: Picture) -> Any:
        """(logits, mask) of a picture, in whatever batch it gets into."""
        return await self._together(picture)


class Entry:
    """A named model from the first request for it to the last after its eviction."""

    def __init__(self) -> None:
        self.model: Model | None = None
        """None while it is being loaded."""
        self.loading: asyncio.Task[Model] | None = None
        self.unused = asyncio.Event()
        self._users = 0

    @asynccontextmanager
    async def used(self) -> AsyncIterator[None]:
        """Whoever waits for the model or works with it keeps it open."""
        self._users += 1
        self.unused.clear()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self.unused.set()


class Models:
    """The models of a replica by name; named ones beyond ``max_models`` make room, the longest unused first."""

    def __init__(self, config: ServiceConfig, metrics: Metrics) -> None:
        self._config, self._metrics = config, metrics
        self._engines = {DEFAULT: config.engine} | config.named_engines()
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._one_load = asyncio.Lock()
        self.default = Model(config.engine, config=config, metrics=metrics)
        self._publish(self.default)

    def __contains__(self, name: str) -> bool:
        return name in self._engines

    @property
    def names(self) -> list[str]:
        return [name for name in self._engines if name != DEFAULT]

    @property
    def trouble(self) -> str | None:
        """Why this replica cannot be relied on, in a line; None when it can."""
        loaded = (entry.model for entry in self._entries.values() if entry.model is not None)
        found = (model.predictor.trouble for model in (self.default, *loaded))
        return next((trouble for trouble in found if trouble is not None), None)

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Model]:
        """The model of a name, loaded if it was not, and kept open while the caller works with it.

        Raises:
            KeyError: there is no such name.
        """
        if name == DEFAULT:
            yield self.default
            return
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = Entry()
            entry.loading = asyncio.create_task(self._load(name, entry, self._engines[name]))
        self._entries.move_to_end(name)
        assert entry.loading is not None
        async with entry.used():
            # Shielded: others wait for the same load when this request runs out of time.
            yield await asyncio.shield(entry.loading)

    async def configure(self, config: ServiceConfig) -> None:
        """Take over live settings."""
        self._config = config
        await self.default.configure(config)
        for name, entry in list(self._entries.items()):
            if self._entries.get(name) is not entry:
                continue  # closed while another one was configured
            async with entry.used():
                if entry.model is not None:
                    await entry.model.configure(config)

    async def _load(self, name: str, entry: Entry, engine: str) -> Model:
        """Load one model at a time; requests for those that are loaded do not wait for it."""
        try:
            async with self._one_load:
                held = [other for other, found in self._entries.items() if found.model is not None]
                for other in held[: max(0, len(held) + 1 - self._config.max_models)]:
                    await self._evict(other)
                model = await asyncio.to_thread(Model, engine, config=self._config, metrics=self._metrics)
                await model.configure(self._config)  # which may have changed meanwhile
                self._publish(model)
                entry.model = model
                return model
        except BaseException:
            self._entries.pop(name, None)  # the next request tries again
            raise

    async def _evict(self, name: str) -> None:
        """Close a model when the requests that hold it have ended; the time limit of requests bounds the wait."""
        entry = self._entries.pop(name)
        await entry.unused.wait()
        assert entry.model is not None
        entry.model.predictor.close()

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
