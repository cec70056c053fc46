"""What stands before all routes of a replica, and what the OpenAPI document says of it."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Collection
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.config import TOKEN_VARIABLE, ServiceConfig, authorised, foreign
from serving.http_errors import ServiceError, refusal
from serving.metrics import Metrics
from serving.proxy import REFUSED_HEADER

log = logging.getLogger("ray.serve")  # which writes the log of a replica, with request ids

TOKEN_SCHEME = "token"  # noqa: S105 - the name of a scheme
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; base-uri 'none'",
}


class Guarded(Protocol):
    """What a replica gives to its guard."""

    config: ServiceConfig
    metrics: Metrics


class Guard:
    """Origin, token, request id, metrics and headers around every route; no exception leaves it with a trace."""

    def __init__(self, app: ASGIApp, *, service: Guarded, open_routes: Collection[str]) -> None:
        self._app, self._service, self._open = app, service, open_routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0
        request = Request(scope)
        identity = request.headers.get("x-request-id", "")[:64] or uuid.uuid4().hex
        headers = HEADERS | {"X-Request-Id": identity.encode("ascii", "replace").decode()}

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(headers)
            await send(message)

        try:
            await (self._refused(request) or self._app)(scope, receive, sent)
        except Exception:
            log.exception("request %s failed", identity)
            if not status:
                message = f"something went wrong here; the log has more under {identity}"
                await refusal(self._service.metrics, ServiceError(500, "internal", message))(scope, receive, sent)
        metrics, route = self._service.metrics, getattr(scope.get("route"), "path", "other")
        before = request.headers.get(REFUSED_HEADER.decode(), "")
        counts = route.endswith("/saliency") and status not in (401, 403)
        if counts and before.isdecimal() and len(before) < 7:  # refused by the proxy, without asking
            metrics.requests.labels(route, 429).inc(int(before))
            metrics.errors.labels("busy").inc(int(before))
        metrics.requests.labels(route, status).inc()
        metrics.request_seconds.labels(route).observe(time.perf_counter() - begun)

    def _refused(self, request: Request) -> Response | None:
        """The answer to a request that gets no further."""
        metrics, digests = self._service.metrics, self._service.config.token_digests
        wrong = None if digests else foreign(request.headers.get("host"), request.headers.get("origin"))
        if wrong is not None:
            return refusal(metrics, ServiceError(403, "foreign", wrong))
        if request.url.path in self._open or authorised(request.headers.get("authorization"), digests):
            return None
        message = "a bearer token is needed in the Authorization header"
        response = refusal(metrics, ServiceError(401, "unauthorised", message))
        response.headers["WWW-Authenticate"] = "Bearer"
        return response


def describe_tokens(api: FastAPI, *, needed: bool) -> None:
    """Say in the OpenAPI document that requests carry a bearer token, where this service wants one."""
    plain = api.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        scheme = {
            "type": "http",
            "scheme": "bearer",
            "description": f"One of the tokens of {TOKEN_VARIABLE} or token_file.",
        }
        document.setdefault("components", {})["securitySchemes"] = {TOKEN_SCHEME: scheme}
        document["security"] = [{TOKEN_SCHEME: []}] if needed else []
        return document

    api.openapi = openapi
