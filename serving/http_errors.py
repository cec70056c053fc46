"""Errors of the service as ``{"error": {"kind", "message"}}``, each counted under its kind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from serving.metrics import Metrics
from serving.proxy import FULL_HEADER, RETRY_AFTER_SECONDS


class ServiceError(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, kind: str, message: str, *, retry_after: int | None = None, full: bool = False
    ) -> None:
        """``full``: no request at all would be let in now, however small (`serving.proxy.KnownFull`)."""
        super().__init__(message)
        self.full = full
        self.status, self.kind, self.message, self.retry_after = status, kind, message, retry_after


class ErrorBody(BaseModel):
    kind: str
    message: str


class ErrorAnswer(BaseModel):
    error: ErrorBody


def described_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI document says of a route's errors, in addition to those that every route has."""
    return {status: {"model": ErrorAnswer} for status in sorted({401, 403, 500, *statuses})}


def busy(*, full: bool = False) -> ServiceError:
    return ServiceError(
        429, "busy", "too many images are waiting; try again", retry_after=RETRY_AFTER_SECONDS, full=full
    )


def refusal(metrics: Metrics, error: ServiceError) -> JSONResponse:
    """The answer of an error, which is counted."""
    metrics.errors.labels(error.kind).inc()
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.full:
        headers[FULL_HEADER.decode()] = "1"
    body = {"error": {"kind": error.kind, "message": error.message}}
    return JSONResponse(body, status_code=error.status, headers=headers)


def add_errors(api: FastAPI, metrics: Metrics) -> None:
    """Answer what routes raise, and what FastAPI refuses by itself, in our own words."""

    def handler(understood: Callable[[Any], ServiceError]) -> Callable[[Request, Exception], Awaitable[Response]]:
        async def handle(_request: Request, error: Exception) -> Response:
            answer = refusal(metrics, understood(error))
            if isinstance(error, HTTPException):
                answer.headers.update(error.headers or {})
            return answer

        return handle

    api.add_exception_handler(ServiceError, handler(lambda error: error))
    api.add_exception_handler(HTTPException, handler(_of_http))
    api.add_exception_handler(RequestValidationError, handler(_of_validation))


def _of_http(error: HTTPException) -> ServiceError:
    kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    return ServiceError(error.status_code, kind, str(error.detail))


def _of_validation(error: RequestValidationError) -> ServiceError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return ServiceError(400, "bad_request", f"{where}: {first['msg']}")
