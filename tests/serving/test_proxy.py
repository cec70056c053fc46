"""What stands in Serve's proxies: bodies that would not fit are refused, and requests whose replica died are told to come back."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterable, MutableMapping
from typing import Any

import pytest

from serving import proxy
from serving.proxy import FULL_HEADER, REFUSED_HEADER, BoundedBodies, KnownFull


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
    bound, known = validate_http_proxy_callback_return(call_function_from_import_path(name))
    assert known.cls is KnownFull and (bound.cls, bound.kwargs) == (BoundedBodies, {"most": 123})
    monkeypatch.setenv(proxy.CALLBACK_VARIABLE, "mine:middlewares")
    proxy.turn_on()
    assert os.environ[proxy.CALLBACK_VARIABLE] == "mine:middlewares"


class Replica:
    """Holds so many requests, until it is told to answer them, and refuses others."""

    def __init__(self, room: int, *, full: bool = True) -> None:
        self.room, self.held, self.asked, self.full = room, 0, 0, full
        self.told: list[bytes] = []
        self.gate = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        self.told += [value for name, value in scope["headers"] if name == REFUSED_HEADER]
        while (await receive())["more_body"]:
            pass
        status, headers = 429, [(FULL_HEADER, b"1")] if self.full else []
        if self.held < self.room:
            self.held += 1
            await self.gate.wait()
            self.held -= 1
            status, headers = 200, []
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


async def post(
    known: KnownFull, path: str = "/v1/saliency", *, method: str = "POST", claims: bytes = b"", parts: int = 4
) -> MutableMapping[str, Any]:
    """The start of the answer to a request whose body comes in so many parts."""
    rest = [b"x" * (1 << 20)] * parts

    async def receive() -> dict[str, Any]:
        part = rest.pop()
        return {"type": "http.request", "body": part, "more_body": bool(rest)}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    sent: list[MutableMapping[str, Any]] = []
    headers = [(REFUSED_HEADER, claims)] if claims else []
    await known({"type": "http", "method": method, "path": path, "headers": headers}, receive, send)
    assert not rest or (b"connection", b"close") in sent[0]["headers"], "a client that still sends must not be cut off"
    assert FULL_HEADER not in dict(sent[0]["headers"]) or method != "POST" or not path.endswith("/saliency")
    return sent[0]


async def filled(replica: Replica, known: KnownFull) -> list[asyncio.Task[MutableMapping[str, Any]]]:
    held = [asyncio.create_task(post(known)) for _ in range(replica.room)]
    while replica.held < replica.room:
        await asyncio.sleep(0)
    return held


def test_a_proxy_refuses_by_itself_what_replicas_have_just_refused() -> None:
    async def crowd() -> None:
        clock = [0.0]
        replica = Replica(3)
        known = KnownFull(replica, now=lambda: clock[0])

        async def one(*words: str, **how: Any) -> int:
            return (await post(known, *words, **how))["status"]

        held = await filled(replica, known)
        assert [await one() for _ in range(100)] == [429] * 100
        assert replica.asked == 4, "the first of them was the replica's word"
        assert await one(method="GET") == 429 and await one("/v1/jobs") == 429 and replica.asked == 6, "others go on"
        endless = await post(known, parts=100)
        assert endless["status"] == 429 and (b"connection", b"close") in endless["headers"]
        clock[0] += 2
        assert await one(claims=b"999") == 429 and replica.asked == 7, "it is asked again, and told how many there were"
        assert await one("/healthz", method="GET", claims=b"999") == 429 and replica.told == [b"100"], "by nobody else"
        replica.gate.set()
        assert [(await task)["status"] for task in held] == [200] * 3
        assert await one("/v1/models/a/saliency") == 200, "less is under way"

    asyncio.run(crowd())


def test_what_is_too_large_for_the_room_that_is_left_says_nothing_of_others() -> None:
    async def crowd() -> None:
        replica = Replica(3, full=False)
        known = KnownFull(replica, now=lambda: 0.0)
        held = await filled(replica, known)
        assert [(await post(known))["status"] for _ in range(5)] == [429] * 5 and replica.asked == 8
        replica.gate.set()
        await asyncio.gather(*held)

    asyncio.run(crowd())


def test_the_proxies_own_refusals_are_remembered_too() -> None:
    async def crowd() -> None:
        app = Proxied(429)
        app.gate.set()
        known = KnownFull(BoundedBodies(app, most=1 << 30), now=lambda: 0.0)
        waiting = Proxied(200)
        known._app, bounded = BoundedBodies(waiting, most=1 << 30), known._app
        held = asyncio.create_task(post(known))
        while not waiting.taken:
            await asyncio.sleep(0)
        known._app = bounded
        taken = [((await post(known))["status"], app.taken >> 20) for _ in range(3)]
        assert taken == [(429, 4)] * 3, "only the first was sent on"
        waiting.gate.set()
        assert (await held)["status"] == 200

    asyncio.run(crowd())
