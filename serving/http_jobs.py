"""Routes of batch jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Header, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from ray.exceptions import RayTaskError

from pipeline.errors import UsageError, WorkError
from serving.config import ServiceConfig
from serving.http_body import read_body
from serving.http_errors import ServiceError, described_errors
from serving.jobs import JobConflict, JobRequest, TooManyJobs
from serving.roots import OutsideRoots, outward

MOST_BYTES = 65536
"""Of the body of a job request."""


_T = TypeVar("_T")


class JobService(Protocol):
    """What a replica gives to these routes."""

    config: ServiceConfig
    jobs: Any
    """A handle of `serving.jobs.JobManager`."""


class Job(BaseModel):
    """The state of a job; places below the service's first root are given relative to it, as a request may name them."""

    id: str
    state: str
    """queued, running, done, failed or cancelled."""
    total: int | None
    """Inputs of the job; null while nobody has counted them."""
    done: int
    errors: int
    images_per_second: float | None
    seconds_left: float | None
    message: str | None
    input: str
    output: str


class JobDetails(Job):
    """The state of a job with some of its error rows."""

    error_rows: list[dict[str, str]]


def add_jobs(api: FastAPI, service: JobService) -> None:
    """``/v1/jobs``."""
    errors = described_errors(503)
    submit_errors = errors | described_errors(400, 409, 413, 415, 422, 429)
    named_errors = errors | described_errors(404)
    body = {"required": True, "content": {"application/json": {"schema": JobRequest.model_json_schema()}}}

    @api.post(
        "/v1/jobs", status_code=202, response_model=Job, responses=submit_errors, openapi_extra={"requestBody": body}
    )
    async def submit(request: Request, idempotency_key: str | None = Header(default=None, max_length=256)) -> Response:
        """Score an image set in the background; the same request again finds the same job."""
        # A page of another site can have a browser send text or a form, but not this type, without asking first.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ServiceError(415, "unsupported_media_type", "a job is described in JSON; send application/json")
        data = await in_time(read_body(request, MOST_BYTES))
        try:
            asked = JobRequest.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "body"
            raise ServiceError(422, "bad_request", f"{where}: {first['msg']}") from error
        job = await called(service.jobs.submit.remote(asked.model_dump(), idempotency_key))
        return JSONResponse(job, status_code=202, headers={"Location": f"v1/jobs/{job['id']}"})

    @api.get("/v1/jobs", response_model=list[Job], responses=errors)
    async def listing() -> Response:
        """All jobs, the newest first."""
        return JSONResponse(await called(service.jobs.listing.remote()))

    @api.get("/v1/jobs/{name}", response_model=JobDetails, responses=named_errors)
    async def get(name: str) -> Response:
        """How far a job is, and some of the images that could not be scored."""
        return JSONResponse(_found(name, await called(service.jobs.get.remote(name))))

    @api.delete("/v1/jobs/{name}", response_model=Job, responses=named_errors)
    async def cancel(name: str) -> Response:
        """End a job; the rows that are there stay, and the same request later goes on from them."""
        return JSONResponse(_found(name, await called(service.jobs.cancel.remote(name))))

    async def called(call: Any) -> Any:
        """The manager's answer or its complaint, which do not say where on this machine things are."""
        try:
            return told(await in_time(_called(call)))
        except ServiceError as error:
            raise ServiceError(error.status, error.kind, told(error.message), retry_after=error.retry_after) from error

    def told(answer: Any) -> Any:
        match answer:
            case str():
                engine = Path(service.config.engine)
                return outward(answer.replace(str(engine), engine.name), service.config.roots)
            case list():
                return [told(item) for item in answer]
            case dict():
                return {name: told(item) for name, item in answer.items()}
            case _:
                return answer

    async def in_time(work: Awaitable[_T]) -> _T:
        try:
            async with asyncio.timeout(service.config.timeout_s):
                return await work
        except TimeoutError as error:
            raise ServiceError(503, "timeout", "this took too long; try again", retry_after=5) from error


def _found(name: str, job: dict[str, Any] | None) -> dict[str, Any]:
    if job is None:
        raise ServiceError(404, "not_found", f"no job {name[:100]}")
    return job


async def _called(call: Any) -> Any:
    """The manager's answer, or its complaint as an HTTP error."""
    try:
        return await call
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, OutsideRoots):
            raise ServiceError(403, "outside_roots", str(cause)) from error
        if isinstance(cause, UsageError):
            raise ServiceError(422, "bad_request", str(cause)) from error
        if isinstance(cause, JobConflict):
            raise ServiceError(409, "conflict", str(cause)) from error
        if isinstance(cause, TooManyJobs):
            raise ServiceError(429, "busy", str(cause), retry_after=30) from error
        if isinstance(cause, WorkError):
            raise ServiceError(503, "store", str(cause), retry_after=5) from error
        raise
