"""Bodies of requests: who is let in, and how much of a body is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect

from serving.config import ServiceConfig
from serving.http_errors import ServiceError, busy
from serving.metrics import Metrics

FORM_OVERHEAD = 1 << 20
"""Bytes that boundaries and headers of a multipart body may take on top of the images."""
LARGEST_BODIES = 8
"""A replica holds no more bytes of bodies than so many of the largest size, however many images that makes."""


class Admission:
    """The images and bytes of the requests that a replica has let in, from before their bodies are read."""

    def __init__(self, metrics: Metrics) -> None:
        self.images = 0
        self.bytes = 0
        self._metrics = metrics

    @contextmanager
    def place(self, config: ServiceConfig) -> Iterator[Place]:
        """Let a request in, for one image until more is known of it.

        Raises:
            ServiceError: the replica is full.
        """
        if self.images >= config.max_queue:
            raise busy(full=True)
        place = Place(self, config)
        try:
            place.hold_images(1)
            yield place
        finally:
            place.leave()

    def add(self, *, images: int = 0, size: int = 0) -> None:
        self.images += images
        self.bytes += size
        self._metrics.queue.set(self.images)


class Place:
    """What one request holds of an `Admission`."""

    def __init__(self, admission: Admission, config: ServiceConfig) -> None:
        self._admission, self._config = admission, config
        self._images = self._bytes = 0

    def hold_images(self, images: int) -> None:
        """Hold so many images from now on; a replica that has nothing else to do takes any number.

        Raises:
            ServiceError: others leave no room for them.
        """
        others = self._admission.images - self._images
        if others and others + images > self._config.max_queue:
            raise busy()
        self._admission.add(images=images - self._images)
        self._images = images

    def add_bytes(self, size: int) -> None:
        """Hold so many bytes more.

        Raises:
            ServiceError: there is no room for them.
        """
        if self._admission.bytes + size > LARGEST_BODIES * (self._config.max_body_bytes + FORM_OVERHEAD):
            raise busy()
        self._admission.add(size=size)
        self._bytes += size

    def leave(self) -> None:
        self._admission.add(images=-self._images, size=-self._bytes)
        self._images = self._bytes = 0


async def read_images(request: Request, config: ServiceConfig, place: Place) -> list[bytes]:
    """The images of a request's body, never more of it than is allowed; ``place`` holds them.

    Raises:
        ServiceError: too large, too many, none, no proper multipart, or no room for them now.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_form = kind == "multipart/form-data"
    body = await read_body(request, config.max_body_bytes + (FORM_OVERHEAD if is_form else 0), place)
    if not is_form:
        return [body]
    images = await _form_images(request, body, config.max_images)
    if not images:
        raise ServiceError(422, "no_image", "the form holds no file; send each image as a file of its own")
    if len(images) > config.max_images:
        raise ServiceError(413, "too_many_images", f"{len(images)} images, the limit is {config.max_images} a request")
    place.hold_images(len(images))
    return images


async def read_body(request: Request, most: int, place: Place | None = None) -> bytes:
    """The body of a request, counted in ``place`` as it comes.

    Raises:
        ServiceError: it is longer than ``most`` bytes (as soon as that is known), there is no room for it, or the client has
            left.
    """
    too_large = ServiceError(413, "too_large", f"the body is larger than {most} bytes")
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > most:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            if len(body) + len(chunk) > most:
                raise too_large
            if place is not None:
                place.add_bytes(len(chunk))
            body += chunk
    except ClientDisconnect as error:
        raise ServiceError(400, "disconnected", "the client left before the body was whole") from error
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
