"""What stands in Serve's proxies: bodies that would not fit are refused, and requests whose replica died are told to come back."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterable, MutableMapping
from typing import Any

import pytest

from serving import proxy
from serving.proxy import REFUSED_HEADER, BoundedBodies, KnownFull


class Proxied:
    """An application that takes bodies as Serve's proxy does: all there is, and it may never answer."""

    def __init__(self, answer: int | None = 200, *, kind: bytes = b"text/plain") -> None:
        self.answer, self.kind = answer, kind
        self.taken = 0
        self.gate = asyncio.Event()

    async def __call__(self, _scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            self.taken += len(message["body"])
            if not message["more_body"]:
                break
        await self.gate.wait()
        if self.answer is not None:
            headers = [(b"content-type", self.kind)]
            await send({"type": "http.response.start", "status": self.answer, "headers": headers})
            await send({"type": "http.response.body", "body": b"words"})


async def ask(bound: BoundedBodies, parts: Iterable[bytes], *, stated: int | None = None) -> dict[str, Any]:
    """Status, headers and body of the answer to one request."""
    rest = list(parts)
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        part = rest.pop(0) if rest else b""
        await asyncio.sleep(0)
        return {"type": "http.request", "body": part, "more_body": bool(rest)}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    headers = [] if stated is None else [(b"content-length", b"%d" % stated)]
    await bound({"type": "http", "headers": headers}, receive, send)
    (start, body) = sent
    named = {name.decode(): value.decode() for name, value in start["headers"]}
    return {"status": start["status"], "headers": named, "body": body["body"]}


def test_no_more_bytes_than_fit_are_taken() -> None:
    async def crowd() -> None:
        app = Proxied()
        bound = BoundedBodies(app, most=1000)
        waiting = asyncio.create_task(ask(bound, [b"x" * 300, b"x" * 300]))
        while bound.held < 600:
            await asyncio.sleep(0)
        for refused in (await ask(bound, [b"x" * 100] * 50), await ask(bound, [], stated=401)):
            assert (refused["status"], refused["headers"]["retry-after"]) == (503, "1")
            assert json.loads(refused["body"])["error"]["kind"] == "unavailable"
        assert (bound.held, app.taken) == (600, 1000)
        app.gate.set()
        assert (await waiting)["status"] == 200
        assert bound.held == 0
        assert (await ask(bound, [b"x" * 1000], stated=1000))["status"] == 200

    asyncio.run(crowd())


@pytest.mark.parametrize(
    ("answer", "seen", "kind"), [(None, 503, "unavailable"), (429, 429, "busy"), (503, 503, "unavailable")]
)
def test_who_is_not_served_is_told_to_come_back(answer: int | None, seen: int, kind: str) -> None:
    found = asyncio.run(one(answer))
    assert (found["status"], found["headers"]["retry-after"]) == (seen, "1")
    assert json.loads(found["body"])["error"]["kind"] == kind


@pytest.mark.parametrize(("answer", "kind"), [(429, b"application/json"), (200, b"text/plain"), (404, b"text/plain")])
def test_other_answers_stay_as_they_are(answer: int, kind: bytes) -> None:
    found = asyncio.run(one(answer, kind=kind))
    assert found == {"status": answer, "headers": {"content-type": kind.decode()}, "body": b"words"}


async def one(answer: int | None, **options: Any) -> dict[str, Any]:
    app = Proxied(answer, **options)
    app.gate.set()
    return await ask(BoundedBodies(app, most=1000), [b"x"])


def test_ray_gets_it_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private.http_util import validate_http_proxy_callback_return
    from ray.serve._private.utils import call_function_from_import_path

    monkeypatch.setenv(proxy.CALLBACK_VARIABLE, "")  # so that it is put back
    monkeypatch.delenv(proxy.CALLBACK_VARIABLE)
    proxy.turn_on()
    name = os.environ[proxy.CALLBACK_VARIABLE]
    monkeypatch.setenv(proxy.BYTES_VARIABLE, "123")
    known, bound = validate_http_proxy_callback_return(call_function_from_import_path(name))
    assert known.cls is KnownFull and (bound.cls, bound.kwargs) == (BoundedBodies, {"most": 123})
    monkeypatch.setenv(proxy.CALLBACK_VARIABLE, "mine:middlewares")
    proxy.turn_on()
    assert os.environ[proxy.CALLBACK_VARIABLE] == "mine:middlewares"


class Replica:
    """Holds so many requests, until it is told to answer them, and refuses others."""

    def __init__(self, room: int) -> None:
        self.room, self.held, self.asked = room, 0, 0
        self.told: list[bytes] = []
        self.gate = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        self.told += [value for name, value in scope["headers"] if name == REFUSED_HEADER]
        while (await receive())["more_body"]:
            pass
        status = 429
        if self.held < self.room:
            self.held += 1
            await self.gate.wait()
            self.held -= 1
            status = 200
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def test_a_proxy_refuses_by_itself_what_replicas_have_just_refused() -> None:
    async def crowd() -> None:
        clock = [0.0]
        replica = Replica(3)
        known = KnownFull(replica, now=lambda: clock[0])

        async def one(path: str = "/v1/saliency", method: str = "POST", claims: bytes = b"") -> int:
            parts = [b"x" * 10] * 4

            async def receive() -> dict[str, Any]:
                part = parts.pop()
                return {"type": "http.request", "body": part, "more_body": bool(parts)}

            async def send(message: MutableMapping[str, Any]) -> None:
                sent.append(message)

            sent: list[MutableMapping[str, Any]] = []
            headers = [(REFUSED_HEADER, claims)] if claims else []
            await known({"type": "http", "method": method, "path": path, "headers": headers}, receive, send)
            assert not parts, "a client that still sends must not be cut off"
            return sent[0]["status"]

        held = [asyncio.create_task(one()) for _ in range(3)]
        while replica.held < 3:
            await asyncio.sleep(0)
        assert [await one() for _ in range(100)] == [429] * 100
        assert replica.asked == 4, "the first of them was the replica's word"
        assert await one(method="GET") == 429 and await one("/v1/jobs") == 429 and replica.asked == 6, (
            "other routes go on"
        )
        clock[0] += 2
        assert await one(claims=b"999") == 429 and replica.asked == 7, "it is asked again, and told how many there were"
        assert replica.told == [b"99"], "and nobody else can say so"
        replica.gate.set()
        assert [await task for task in held] == [200] * 3
        assert await one("/v1/models/a/saliency") == 200, "less is under way"

    asyncio.run(crowd())
