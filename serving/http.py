"""The HTTP face of a replica: routes, limits, tokens, and errors as ``{"error": {"kind", "message"}}``."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from pipeline.data.decode import ImageError
from serving.codec import encode_png, overlay
from serving.config import ServiceConfig, authorised
from serving.metrics import CONTENT_TYPE, Metrics
from serving.models import DEFAULT, Model, Models
from serving.predictor import Picture

log = logging.getLogger("ray.serve")  # which writes the log of a replica, with request ids

STATIC = Path(__file__).with_name("static")
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/app.css": ("app.css", "text/css"),
}
STATUS = {"undecodable": 422, "unreadable": 422, "too_many_pixels": 413, "too_large": 413, "too_many_images": 413}
OPEN_ROUTES = ("/healthz", *PAGE_FILES)
"""What answers without a token: the health check, and the page itself, which asks for the token."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; base-uri 'none'",
}
FORM_OVERHEAD = 1 << 20
"""Bytes that boundaries and headers of a multipart body may take on top of the images."""


class ServiceError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, kind: str, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.retry_after = status, kind, message, retry_after


class Service(Protocol):
    """What a replica gives to its routes."""

    config: ServiceConfig
    metrics: Metrics
    models: Models
    under_way: int

    async def all_metrics(self) -> bytes:
        """Metrics of all replicas, in Prometheus' text format."""
        ...


class ClassScore(BaseModel):
    """One of the most probable classes."""

    label: int
    class_name: str
    score: float


class Saliency(BaseModel):
    """What the service says of one image; boxes and views are in pixels of the upright original."""

    label: int
    class_name: str
    score: float
    topk: list[ClassScore]
    box: list[float] | None
    """x0, y0, x1, y1; null when no part of the mask stands out."""
    view: list[float]
    area: float
    width: int
    height: int
    mask: str
    """8-bit grey PNG at the network's native resolution, in base64; it covers the view."""
    engine: str


class ErrorBody(BaseModel):
    kind: str
    message: str


class ErrorAnswer(BaseModel):
    error: ErrorBody


def build_api(service: Service) -> FastAPI:
    """The application of one replica."""
    api = FastAPI(
        title="onepass-saliency",
        description="Class and saliency map of an image, in one pass.",
        redirect_slashes=False,
        redoc_url=None,
        docs_url=None,
    )
    api.middleware("http")(_guard(service))
    api.add_exception_handler(ServiceError, _answer_error)
    api.add_exception_handler(HTTPException, _answer_http_error)
    api.add_exception_handler(RequestValidationError, _answer_invalid)
    add_scoring(api, service)
    add_pages(api, service)
    return api


def add_scoring(api: FastAPI, service: Service) -> None:
    """``POST /v1/saliency``."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    files = {"schema": {"type": "object", "properties": {"image": {"type": "array", "items": binary["schema"]}}}}
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorAnswer} for status in (400, 401, 406, 413, 422, 429, 500, 503)
    }

    described: dict[str, Any] = {
        "response_model": Saliency | list[Saliency | ErrorAnswer],
        "responses": errors | {200: {"content": {"image/png": binary}}},
        "openapi_extra": {
            "requestBody": {"required": True, "content": {"image/*": binary, "multipart/form-data": files}}
        },
    }

    @api.post("/v1/saliency", **described)
    async def saliency(request: Request, topk: int | None = Query(default=None, ge=1, le=1000)) -> Response:
        """Class, saliency mask and box of one image (the body) or of several (multipart).

        ``Accept: image/png`` gives the image with its mask drawn over it instead of JSON.
        """
        return await answer(request, topk, DEFAULT)

    @api.post("/v1/models/{name}/saliency", **described)
    async def saliency_of(
        name: str, request: Request, topk: int | None = Query(default=None, ge=1, le=1000)
    ) -> Response:
        """The same by another engine of this service."""
        return await answer(request, topk, name)

    @api.get("/v1/models", response_model=list[str], responses={401: {"model": ErrorAnswer}})
    async def models() -> Response:
        """Names of the further engines of this service."""
        return JSONResponse(service.models.names)

    async def answer(request: Request, topk: int | None, name: str) -> Response:
        drawn = wants_picture(request.headers.get("accept", ""))
        if service.under_way >= service.config.max_queue:
            raise ServiceError(429, "busy", "too many images are waiting; try again", retry_after=1)
        images = await read_images(request, service.config)
        if drawn and len(images) > 1:
            raise ServiceError(
                406, "one_image_only", "an overlay is of one image; send one, or accept application/json"
            )
        if service.under_way and service.under_way + len(images) > service.config.max_queue:
            raise ServiceError(429, "busy", "too many images are waiting; try again", retry_after=1)
        model = await service.models.get(name)
        if model is None:
            raise ServiceError(404, "not_found", f"no model {name[:100]}")
        count = service.config.top_k if topk is None else topk
        try:
            async with asyncio.timeout(service.config.timeout_s):
                found = await score_all(service, model, images, top_k=count, keep=drawn)
        except TimeoutError as error:
            raise ServiceError(503, "timeout", "the image was not scored in time; try again", retry_after=1) from error
        if len(found) == 1 and isinstance(found[0], ImageError):
            raise ServiceError(STATUS[found[0].kind], found[0].kind, found[0].message)
        if drawn:
            assert not isinstance(found[0], ImageError)
            picture, row = found[0]
            png = await model.predictor.run(_draw, picture.copy, row)
            return Response(png, media_type="image/png")
        answers = [_fields(item) for item in found]
        return JSONResponse(answers if len(answers) > 1 else answers[0])


def add_pages(api: FastAPI, service: Service) -> None:
    """The page, the health check and the metrics."""

    @api.get("/healthz")
    async def healthz() -> Response:
        """Whether the replica that answers can score."""
        if service.models.stuck:
            return JSONResponse({"status": "stuck"}, status_code=503)
        return JSONResponse({"status": "ok", "engine": service.models.default.predictor.info.sha256})

    @api.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(await service.all_metrics(), media_type=CONTENT_TYPE)

    for route, (name, kind) in PAGE_FILES.items():
        content = (STATIC / name).read_bytes()

        def page(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind)

        api.get(route, include_in_schema=False)(_plain(page))


def _plain(page: Callable[[], Response]) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return page()

    return answer


async def score_all(
    service: Service, model: Model, images: list[bytes], *, top_k: int, keep: bool
) -> list[tuple[Picture, dict[str, Any]] | ImageError]:
    """Score the images of a request at once; an image that cannot be decoded spoils only its own place."""

    async def one(data: bytes) -> tuple[Picture, dict[str, Any]] | ImageError:
        try:
            picture = await model.predictor.decode(data, keep=keep)
        except ImageError as error:
            service.metrics.errors.labels(error.kind).inc()
            return error
        logits, mask = await model.infer(picture)
        row = await model.predictor.finish(picture, logits, mask, uri="", top_k=top_k)
        service.metrics.images.inc()
        return picture, row

    service.under_way += len(images)
    service.metrics.queue.set(service.under_way)
    try:
        return list(await asyncio.gather(*map(one, images)))
    finally:
        service.under_way -= len(images)
        service.metrics.queue.set(service.under_way)


async def read_images(request: Request, config: ServiceConfig) -> list[bytes]:
    """The images of a request's body, never more of it than is allowed.

    Raises:
        ServiceError: too large, too many, none, or no proper multipart.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_form = kind == "multipart/form-data"
    body = await read_body(request, config.max_body_bytes + (FORM_OVERHEAD if is_form else 0))
    if not is_form:
        return [body]
    images = await _form_images(request, body, config.max_images)
    if not images:
        raise ServiceError(422, "no_image", "the form holds no file; send each image as a file of its own")
    if len(images) > config.max_images:
        raise ServiceError(413, "too_many_images", f"{len(images)} images, the limit is {config.max_images} a request")
    return images


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request.  Raises `ServiceError` as soon as it is known to be longer than ``most`` bytes."""
    too_large = ServiceError(413, "too_large", f"the body is larger than {most} bytes")
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > most:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise too_large
    return bytes(body)


async def _form_images(request: Request, body: bytes, most: int) -> list[bytes]:
    """The files of a multipart body that has been read already."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    form = None
    try:
        form = await Request(request.scope, receive).form(max_files=most + 1, max_fields=100)
        return [await part.read() for _, part in form.multi_items() if isinstance(part, UploadFile)]
    except (MultiPartException, HTTPException, KeyError, ValueError, UnicodeDecodeError) as error:
        detail = str(getattr(error, "detail", None) or getattr(error, "message", None) or error)
        if "Too many files" in detail:
            raise ServiceError(413, "too_many_images", f"more than {most} images in one request") from error
        raise ServiceError(400, "bad_form", f"the multipart body cannot be read: {detail}") from error
    finally:
        if form is not None:
            await form.close()


def wants_picture(accept: str) -> bool:
    """Whether an ``Accept`` header asks for an overlay: it names image/png, and not JSON."""
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    return "image/png" in kinds and "application/json" not in kinds


def _draw(image: Any, row: dict[str, Any]) -> bytes:
    return encode_png(overlay(image, row))


def _fields(found: tuple[Picture, dict[str, Any]] | ImageError) -> dict[str, Any]:
    if isinstance(found, ImageError):
        return {"error": {"kind": found.kind, "message": found.message}}
    row = found[1]
    names = ("label", "class_name", "score", "topk", "box", "view", "area", "width", "height", "engine")
    return {name: row[name] for name in names} | {"mask": base64.b64encode(row["mask"]).decode()}


def _guard(service: Service) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]:
    """Token, request id, metrics and headers around every route; no exception leaves it with a trace."""

    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        begun = time.perf_counter()
        identity = request.headers.get("x-request-id", "")[:64] or uuid.uuid4().hex
        try:
            if request.url.path in OPEN_ROUTES or authorised(
                request.headers.get("authorization"), service.config.token_digests
            ):
                response = await call_next(request)
            else:
                response = error_answer(401, "unauthorised", "a bearer token is needed in the Authorization header")
                response.headers["WWW-Authenticate"] = "Bearer"
        except Exception:
            log.exception("request %s failed", identity)
            response = error_answer(500, "internal", f"something went wrong here; the log has more under {identity}")
        route = getattr(request.scope.get("route"), "path", "other")
        service.metrics.requests.labels(route, response.status_code).inc()
        service.metrics.request_seconds.labels(route).observe(time.perf_counter() - begun)
        response.headers.update(HEADERS | {"X-Request-Id": identity.encode("ascii", "replace").decode()})
        return response

    return guard


def error_answer(status: int, kind: str, message: str, *, retry_after: int | None = None) -> JSONResponse:
    headers = {"Retry-After": str(retry_after)} if retry_after is not None else None
    return JSONResponse({"error": {"kind": kind, "message": message}}, status_code=status, headers=headers)


async def _answer_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return error_answer(error.status, error.kind, error.message, retry_after=error.retry_after)


async def _answer_http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    answer = error_answer(error.status_code, kind, str(error.detail))
    answer.headers.update(error.headers or {})
    return answer


async def _answer_invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return error_answer(400, "bad_request", f"{where}: {first['msg']}")
