"""The service on Ray Serve.

    serve run serving.app:build engine=model.onnx

Settings are those of `serving.config.ServiceConfig`, as ``key=value`` or as ``args`` of a Serve config file; its
``user_config`` changes those of `LiveConfig` while the service runs.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import click
from fastapi import FastAPI
from ray import serve

from pipeline.errors import UsageError
from serving.config import LiveConfig, ServiceConfig, check_exposure, live_settings, parse_config
from serving.http import build_api
from serving.http_body import Admission
from serving.http_jobs import add_jobs
from serving.jobs import JobManager
from serving.metrics import Metrics, text
from serving.models import Models
from serving.proxy import RETRY_AFTER_SECONDS, turn_on

OTHER_REQUESTS = 16
"""Requests that a replica takes besides those that its queue of images has room for."""
TELL_SECONDS = 5.0
LOGGING = {"encoding": "JSON", "log_level": "INFO", "enable_access_log": True}

log = logging.getLogger("ray.serve")


class WrongArguments(click.ClickException):
    """Wrong arguments of ``serve run``, which then prints one line and exits with status 2."""

    exit_code = 2


@serve.deployment(name="saliency")
@serve.ingress()
class SaliencyService:
    """One replica: an engine, its HTTP face, and batches that form as images come."""

    def __init__(self, config: dict[str, Any], jobs: Any) -> None:
        self.config = self._arguments = ServiceConfig.model_validate(config)
        self.jobs = jobs
        check_exposure(proxy_host(), self.config.token_digests)
        replica = serve.get_replica_context().replica_id.unique_id
        self.metrics = Metrics(replica=replica)
        self.replica = replica
        self.admission = Admission(self.metrics)
        self.models = Models(self.config, self.metrics)
        self._telling = asyncio.get_running_loop().create_task(self._tell())

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = build_api(self)
        add_jobs(api, self)
        return api

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over live settings; those that are not named keep the values of the arguments."""
        # A replica that raised here would be ended, and its successors with it, so a wish that cannot be met leaves the
        # service running.
        live, amiss = live_settings(self._arguments, user_config, most=self._arguments.max_queue)
        if amiss:
            log.error(amiss)
        self.config = self.config.model_copy(update=live.model_dump(include=set(LiveConfig.model_fields)))
        await self.models.configure(self.config)

    def check_health(self) -> None:
        """Serve replaces a replica that raises here."""
        if (trouble := self.models.trouble) is not None:
            raise RuntimeError(trouble)

    async def all_metrics(self) -> bytes:
        """Metrics of all replicas; of this one alone while the others' are not to be had."""
        snapshot = self.metrics.snapshot()
        try:
            async with asyncio.timeout(5):
                return text(await self.jobs.gather.remote(self.replica, snapshot))
        except Exception:
            log.exception("the metrics of the other replicas are not to be had")
            return text([snapshot])

    async def _tell(self) -> None:
        """Tell the others' collector, so that whichever replica is asked can answer for all."""
        while True:
            try:
                await self.jobs.gather.remote(self.replica, self.metrics.snapshot())
            except Exception:
                log.exception("cannot tell my metrics")
            await asyncio.sleep(TELL_SECONDS)


def build(args: dict[str, Any]) -> serve.Application:
    """The application, for ``serve run serving.app:build key=value`` and for Serve config files.

    Raises:
        WrongArguments: an argument is missing or wrong.
    """
    try:
        config = parse_config(args)
    except UsageError as error:
        raise WrongArguments(str(error)) from error
    turn_on()
    fewest, most = config.replica_range()
    # As many requests as a replica may hold images, so that no batch is cut short, and some of other routes.  Beyond it a
    # replica refuses, and for a moment the proxies by themselves (`serving.proxy.KnownFull`).  As many again may wait in a
    # proxy: all that come at once do for a moment, and those that come while a replica is replaced.
    options: dict[str, Any] = {
        "max_ongoing_requests": config.max_queue + OTHER_REQUESTS,
        "max_queued_requests": config.max_queue + OTHER_REQUESTS,
        "backpressure_config": {"status_code": 429, "retry_after_s": RETRY_AFTER_SECONDS},
        "ray_actor_options": {"num_cpus": config.cpus, "num_gpus": config.gpus},
        "health_check_period_s": 5,
        "logging_config": LOGGING,
        "graceful_shutdown_timeout_s": config.timeout_s,
    }
    if most > fewest:
        target = max(1, config.batch_size)
        options["autoscaling_config"] = {
            "min_replicas": fewest,
            "max_replicas": most,
            "target_ongoing_requests": target,
        }
    else:
        options["num_replicas"] = fewest
    jobs = JobManager.bind(config.model_dump())
    return SaliencyService.options(**options).bind(config.model_dump(), jobs)


def proxy_host() -> str | None:
    """The address that Serve's HTTP proxies listen on, as the controller knows it; None when it does not say."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    options: Any = ray.get(controller.get_http_config.remote())
    return options.host
