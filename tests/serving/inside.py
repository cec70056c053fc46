"""The service's HTTP face in this process, without Ray: the same routes, spoken to over ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np

from serving import http, http_jobs
from serving.config import ServiceConfig
from serving.http_body import Admission
from serving.metrics import Metrics
from serving.predictor import Predictor

ADDRESS = "http://127.0.0.1:8000"


class StillModel:
    """A model that answers as the engine does, one picture at a time."""

    def __init__(self, engine: str, *, config: ServiceConfig, metrics: Metrics) -> None:
        self.predictor = Predictor(engine, provider="auto", threads=1, max_pixels=config.max_pixels, metrics=metrics)

    async def infer(self, picture: Any) -> tuple[np.ndarray, np.ndarray]:
        return (await self.predictor.infer([picture]))[0]


class Jobs:
    """A handle of a manager that is called here."""

    def __init__(self, **answers: Any) -> None:
        for name, answer in answers.items():
            setattr(self, name, SimpleNamespace(remote=answer))


class StillModels:
    """The one model of `InsideService`."""

    def __init__(self, model: Any) -> None:
        self.default = model
        self.names: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name == ""

    @property
    def trouble(self) -> str | None:
        return self.default.predictor.trouble

    @asynccontextmanager
    async def use(self, _name: str) -> AsyncIterator[Any]:
        yield self.default


class InsideService:
    """What a replica gives to its routes."""

    def __init__(self, engine: str, *, jobs: Any = None, **settings: Any) -> None:
        self.config = ServiceConfig(engine=engine, **settings)
        self.metrics = Metrics(replica="inside")
        self.admission = Admission(self.metrics)
        self.models: Any = StillModels(StillModel(engine, config=self.config, metrics=self.metrics))
        self.jobs = jobs
        self.app = http.build_api(self)
        http_jobs.add_jobs(self.app, self)

    async def all_metrics(self) -> bytes:
        return b""

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url=ADDRESS, timeout=30)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The answer to one request."""

        async def asked() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, path, **options)

        return asyncio.run(asked())

    def errors(self) -> dict[str, float]:
        """How often each kind of error has been counted."""
        samples = next(family for family in self.metrics.registry.collect() if family.name == "onepass_errors").samples
        return {s.labels["kind"]: s.value for s in samples if s.name.endswith("_total")}
