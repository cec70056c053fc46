"""The HTTP face of a replica: its routes."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from pipeline.data.decode import ImageError
from serving.codec import encode_png, overlay
from serving.config import ServiceConfig
from serving.http_body import Admission, read_images
from serving.http_errors import ErrorAnswer, ServiceError, add_errors, described_errors
from serving.http_guard import Guard, describe_tokens
from serving.metrics import CONTENT_TYPE, Metrics
from serving.models import DEFAULT, Model, Models
from serving.predictor import Picture

STATIC = Path(__file__).with_name("static")
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/app.css": ("app.css", "text/css"),
}
STATUS = {"undecodable": 422, "unreadable": 422, "too_many_pixels": 413, "too_large": 413, "too_many_images": 413}
OPEN_ROUTES = ("/healthz", *PAGE_FILES)
"""What answers without a token: the health check, and the page itself, which asks for the token."""


class Wish(BaseModel):
    """What a request may ask for besides its images."""

    topk: int | None = Field(default=None, ge=1, le=1000)
    """Classes in ``topk``; by default as many as the service was told."""
    opacity: float = Field(default=0.5, ge=0, le=1)
    """Of the mask in an overlay; 0 gives the picture as it was decoded."""
    box: bool = True
    """Whether an overlay shows the box."""


class Service(Protocol):
    """What a replica gives to its routes."""

    config: ServiceConfig
    metrics: Metrics
    models: Models
    admission: Admission

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


class Health(BaseModel):
    """Whether the replica that answered can score."""

    status: str
    """ok or failing."""
    engine: str
    """SHA-256 of the engine of /v1/saliency."""
    message: str | None = None
    """What is wrong, when something is."""


def build_api(service: Service) -> FastAPI:
    """The application of one replica."""
    api = FastAPI(
        title="onepass-saliency",
        description="Class and saliency map of an image, in one pass.",
        redirect_slashes=False,
        redoc_url=None,
        docs_url=None,
    )
    api.add_middleware(Guard, service=service, open_routes=OPEN_ROUTES)
    add_errors(api, service.metrics)
    add_scoring(api, service)
    add_pages(api, service)
    describe_tokens(api, needed=bool(service.config.token_digests))
    return api


def add_scoring(api: FastAPI, service: Service) -> None:
    """``POST /v1/saliency``."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    files = {"schema": {"type": "object", "properties": {"image": {"type": "array", "items": binary["schema"]}}}}
    errors = described_errors(400, 406, 413, 422, 429, 503)

    described: dict[str, Any] = {
        "response_model": Saliency | list[Saliency | ErrorAnswer],
        "responses": errors | {200: {"content": {"image/png": binary}}},
        "openapi_extra": {
            "requestBody": {"required": True, "content": {"image/*": binary, "multipart/form-data": files}}
        },
    }

    @api.post("/v1/saliency", **described)
    async def saliency(request: Request, wish: Annotated[Wish, Query()]) -> Response:
        """Class, saliency mask and box of one image (the body) or of several (multipart).

        ``Accept: image/png`` gives the image, upright, with its mask and box drawn over it instead of JSON.
        """
        return await answer(request, wish, DEFAULT)

    @api.post("/v1/models/{name}/saliency", **described | {"responses": described["responses"] | described_errors(404)})
    async def saliency_of(name: str, request: Request, wish: Annotated[Wish, Query()]) -> Response:
        """The same by another engine of this service."""
        return await answer(request, wish, name)

    @api.get("/v1/models", response_model=list[str], responses=described_errors())
    async def models() -> Response:
        """Names of the further engines of this service."""
        return JSONResponse(service.models.names)

    async def answer(request: Request, wish: Wish, name: str) -> Response:
        drawn = wants_picture(request.headers.get("accept", ""))
        if name not in service.models:
            raise ServiceError(404, "not_found", f"no model {name[:100]}")
        try:
            async with asyncio.timeout(service.config.timeout_s):
                return await answer_in_time(request, wish, name, drawn=drawn)
        except TimeoutError as error:
            raise ServiceError(503, "timeout", "the image was not scored in time; try again", retry_after=1) from error

    async def answer_in_time(request: Request, wish: Wish, name: str, *, drawn: bool) -> Response:
        count = service.config.top_k if wish.topk is None else wish.topk
        with service.admission.place(service.config) as place:
            images = await read_images(request, service.config, place)
            if drawn and len(images) > 1:
                raise ServiceError(
                    406, "one_image_only", "an overlay is of one image; send one, or accept application/json"
                )
            async with service.models.use(name) as model:
                found = await score_all(service, model, images, top_k=count, keep=drawn)
                if len(found) == 1 and isinstance(found[0], ImageError):
                    raise ServiceError(STATUS[found[0].kind], found[0].kind, found[0].message)
                if drawn:
                    assert not isinstance(found[0], ImageError)
                    picture, row = found[0]
                    png = await model.predictor.run(_draw, picture.copy, row, wish)
                    return Response(png, media_type="image/png")
        for item in found:
            if isinstance(item, ImageError):
                service.metrics.errors.labels(item.kind).inc()
        answers = [_fields(item) for item in found]
        return JSONResponse(answers if len(answers) > 1 else answers[0])


def add_pages(api: FastAPI, service: Service) -> None:
    """The page, the health check and the metrics."""

    health_errors = {status: what for status, what in described_errors().items() if status != 401}

    @api.get(
        "/healthz",
        response_model=Health,
        responses=health_errors | {503: {"model": Health}},
        openapi_extra={"security": []},
    )
    async def healthz() -> Response:
        """Whether the replica that answers can score."""
        trouble = service.models.trouble
        health = Health(
            status="failing" if trouble else "ok", engine=service.models.default.predictor.info.sha256, message=trouble
        )
        return JSONResponse(health.model_dump(), status_code=503 if trouble else 200)

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
            return error
        logits, mask = await model.infer(picture)
        row = await model.predictor.finish(picture, logits, mask, uri="", top_k=top_k)
        service.metrics.images.inc()
        return picture, row

    tasks = [asyncio.create_task(one(data)) for data in images]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        # The others end before the request gives back its places and its model.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def wants_picture(accept: str) -> bool:
    """Whether an ``Accept`` header asks for an overlay: it names image/png, and not JSON."""
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    return "image/png" in kinds and "application/json" not in kinds


def _draw(image: Any, row: dict[str, Any], wish: Wish) -> bytes:
    return encode_png(overlay(image, row, opacity=wish.opacity, draw_box=wish.box))


def _fields(found: tuple[Picture, dict[str, Any]] | ImageError) -> dict[str, Any]:
    if isinstance(found, ImageError):
        return {"error": {"kind": found.kind, "message": found.message}}
    row = found[1]
    names = ("label", "class_name", "score", "topk", "box", "view", "area", "width", "height", "engine")
    return {name: row[name] for name in names} | {"mask": base64.b64encode(row["mask"]).decode()}
