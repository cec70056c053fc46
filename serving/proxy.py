"""What stands in Serve's HTTP proxies, before all replicas: a bound on the bodies that wait there, refusals that cost no replica
any time, and answers in our words.

A proxy takes a body as fast as its client sends it and keeps what no replica has fetched, so that clients could fill its memory
while replicas are busy, starting or gone; and of a replica that dies under a request it says 500, which tells nobody that the
request can be sent again.  `build` turns this on where ``serve run serving.app:build`` starts the cluster; for clusters that are
there already, and for Serve config files, set the variable for all nodes:

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serving.proxy:middlewares
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
BYTES_VARIABLE = "ONEPASS_PROXY_BYTES"
DEFAULT_BYTES = 1 << 30
RETRY_AFTER_SECONDS = 1
REFUSED_HEADER = b"x-onepass-refused"
"""How many requests a proxy has refused by itself since it last sent one on; a replica counts them."""
FULL_HEADER = b"x-onepass-full"
"""Of a refusal by a replica or a proxy that would let nothing in now."""
MOST_DRAINED, DRAINING_SECONDS = 16 << 20, 10.0
"""What is read and thrown away of the body of a refused request, and for how long."""


def turn_on() -> None:
    """Have the proxies of a cluster that this process will start use `middlewares`; another choice is left as it is."""
    os.environ.setdefault(CALLBACK_VARIABLE, f"{__name__}:{middlewares.__name__}")


def middlewares() -> list[Middleware]:
    """What Ray asks for in each proxy when it starts."""
    return [  # from the inside out
        Middleware(BoundedBodies, most=_number(BYTES_VARIABLE, DEFAULT_BYTES)),
        Middleware(KnownFull),
    ]


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal():
        raise ValueError(f"{variable}={text}: give a number of bytes")
    return int(text)


class KnownFull:
    """Refuses with 429 what replicas would refuse, for a second after one of them did.

    A replica that is full says so only after the request's body has come to it, which under an overload costs the time that
    scoring needs.  So the proxy remembers how many requests for masks were under way when one was refused that would have
    been let in had there been any room, and for ``hold`` seconds sends on no more than that; then it asks again.  Less under
    way, and the next request goes through.
    """

    def __init__(
        self, app: ASGIApp, *, hold: float = RETRY_AFTER_SECONDS, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._app, self._hold, self._now = app, hold, now
        self._under_way = self._refused = 0
        self._most, self._until = 1, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Nobody but this proxy says how many it has refused.
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != REFUSED_HEADER]
        if scope["method"] != "POST" or not scope["path"].endswith("/saliency"):
            await self._app({**scope, "headers": headers}, receive, send)
            return
        if self._under_way >= self._most and self._now() < self._until:
            self._refused += 1
            await _refuse(send, 429, close=not await _drained(receive))
            return

        async def watched(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                kept = [(name, value) for name, value in message["headers"] if name.lower() != FULL_HEADER]
                if len(kept) < len(list(message["headers"])):
                    self._most, self._until = max(1, self._under_way - 1), self._now() + self._hold
                    message = {**message, "headers": kept}
            await send(message)

        if self._refused:
            headers.append((REFUSED_HEADER, b"%d" % self._refused))
        self._refused = 0
        self._under_way += 1
        try:
            await self._app({**scope, "headers": headers}, receive, watched)
        finally:
            self._under_way -= 1


async def _drained(receive: Receive) -> bool:
    """Read what is left of a body, as far as it is worth it: a client that is cut off while it sends does not see the answer."""
    size = 0
    try:
        async with asyncio.timeout(DRAINING_SECONDS):
            while size <= MOST_DRAINED:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return True
    except TimeoutError:
        pass
    return False


class BoundedBodies:
    """Refuses with 503 what would make the bodies of the requests under way longer than ``most`` bytes together.

    All bytes of a request count until it is answered, whether a replica has fetched them or not: of the proxy's own memory that
    is the most there can be, besides the 64 KiB that the server reads ahead for each connection.
    """

    def __init__(self, app: ASGIApp, *, most: int) -> None:
        self._app, self._most = app, most
        self.held = 0
        """Bytes of the requests under way."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        mine, own, begun, full = 0, 0, False, False
        stated = Headers(scope=scope).get("content-length", "")
        if stated.isdigit() and self.held + int(stated) > self._most:
            await _refuse(send)
            return

        async def counted() -> MutableMapping[str, Any]:
            nonlocal mine, full
            message = await receive()
            size = len(message.get("body", b""))
            if full or self.held + size > self._most:
                full = True
                return {"type": "http.disconnect"}  # upon which the proxy cancels the request
            self.held += size
            mine += size
            return message

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal begun, own
            begun = True
            if message["type"] == "http.response.start":
                kind = Headers(raw=list(message["headers"])).get("content-type", "")
                if message["status"] in (429, 503) and not kind.startswith("application/json"):
                    own = message["status"]  # the proxy's own words
            if not own:
                await send(message)
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                await _refuse(send, own, full=own == 429)

        try:
            await self._app(scope, counted, watched)
        finally:
            self.held -= mine
        if not begun:  # too long, or its replica has died, or its client has left
            await _refuse(send)


async def _refuse(send: Send, status: int = 503, *, close: bool = False, full: bool = False) -> None:
    kind = "busy" if status == 429 else "unavailable"
    body = json.dumps(
        {"error": {"kind": kind, "message": "the service cannot take this request now; try again"}}
    ).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"%d" % RETRY_AFTER_SECONDS),
    ]
    if status == 503 or close:  # the rest of the body need not come
        headers.append((b"connection", b"close"))
    if full:
        headers.append((FULL_HEADER, b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
