"""What stands in Serve's HTTP proxies, before all replicas: a bound on the bodies that wait there, and answers in our words.

A proxy takes a body as fast as its client sends it and keeps what no replica has fetched, so that clients could fill its memory
while replicas are busy, starting or gone; and of a replica that dies under a request it says 500, which tells nobody that the
request can be sent again.  `build` turns this on where ``serve run serving.app:build`` starts the cluster; for clusters that are
there already, and for Serve config files, set the variable for all nodes:

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serving.proxy:middlewares
"""

from __future__ import annotations

import json
import os
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
BYTES_VARIABLE = "ONEPASS_PROXY_BYTES"
DEFAULT_BYTES = 1 << 30
RETRY_AFTER_SECONDS = 1


def turn_on() -> None:
    """Have the proxies of a cluster that this process will start use `middlewares`; another choice is left as it is."""
    os.environ.setdefault(CALLBACK_VARIABLE, f"{__name__}:{middlewares.__name__}")


def middlewares() -> list[Middleware]:
    """What Ray asks for in each proxy when it starts."""
    return [Middleware(BoundedBodies, most=int(os.environ.get(BYTES_VARIABLE) or DEFAULT_BYTES))]


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
                await _refuse(send, own)

        try:
            await self._app(scope, counted, watched)
        finally:
            self.held -= mine
        if not begun:  # too long, or its replica has died, or its client has left
            await _refuse(send)


async def _refuse(send: Send, status: int = 503) -> None:
    kind = "busy" if status == 429 else "unavailable"
    body = json.dumps(
        {"error": {"kind": kind, "message": "the service cannot take this request now; try again"}}
    ).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"%d" % RETRY_AFTER_SECONDS),
    ]
    if status == 503:  # the rest of the body need not come
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
