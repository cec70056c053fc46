"""The service's HTTP face without Ray: what is let in, what is refused and counted, and what health says."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from ray.exceptions import RayTaskError

from pipeline.errors import UsageError
from serving import predictor
from serving.config import ServiceConfig
from serving.http_body import LARGEST_BODIES, Admission
from serving.http_errors import ServiceError
from serving.metrics import Metrics
from tests.serving.inside import InsideService, Jobs


async def trickle(*parts: bytes, pause: float = 30.0) -> AsyncIterator[bytes]:
    """A body whose client takes its time."""
    for part in parts:
        yield part
    await asyncio.sleep(pause)
    yield b""


def test_a_body_that_does_not_come_is_given_up(bundle: Path) -> None:
    service = InsideService(str(bundle), timeout_s=0.3)
    begun = time.monotonic()
    for path in ("/v1/saliency", "/v1/jobs"):
        answer = service.ask("POST", path, content=trickle(b"x"), headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["kind"]) == (503, "timeout")
        assert "Retry-After" in answer.headers
    assert time.monotonic() - begun < 10
    assert (service.admission.images, service.admission.bytes) == (0, 0)


def test_an_engine_that_takes_too_long_is_answered_for(
    bundle: Path, jpeg: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = InsideService(str(bundle), timeout_s=0.3)

    async def endless(_picture: Any) -> None:
        await asyncio.sleep(30)

    monkeypatch.setattr(service.models.default, "infer", endless)
    answer = service.ask("POST", "/v1/saliency", content=jpeg(1))
    assert (answer.status_code, answer.json()["error"]["kind"]) == (503, "timeout")


def test_bodies_that_are_being_read_fill_the_replica(bundle: Path, jpeg: Callable[[int], bytes]) -> None:
    service = InsideService(str(bundle), timeout_s=1.0, max_queue=16)

    async def crowd() -> list[int]:
        async with service.client() as client:
            slow = [asyncio.create_task(client.post("/v1/saliency", content=trickle(b"x"))) for _ in range(16)]
            while service.admission.bytes < 16:
                await asyncio.sleep(0.01)
            refused = await client.post("/v1/saliency", content=jpeg(1))
            assert refused.json()["error"]["kind"] == "busy"
            ended = [answer.status_code for answer in await asyncio.gather(*slow)]
            assert (await client.post("/v1/saliency", content=jpeg(1))).status_code == 200
            return [refused.status_code, *ended]

    assert asyncio.run(crowd()) == [429] + [503] * 16


def test_a_replica_holds_so_many_bytes_and_no_more() -> None:
    config = ServiceConfig(engine="/none", max_body_bytes=1 << 20, max_queue=64)
    admission = Admission(Metrics(replica="r"))
    room = LARGEST_BODIES * (2 << 20)  # a multipart body may be 1 MiB longer than its images
    with admission.place(config) as first:
        first.add_bytes(room - 5)
        with pytest.raises(ServiceError, match="try again"), admission.place(config) as second:
            second.add_bytes(6)
        assert (admission.images, admission.bytes) == (1, room - 5)
        with pytest.raises(ServiceError, match="try again"), admission.place(config) as second:
            second.hold_images(64)
        first.hold_images(100)  # more than the queue holds, from a client who is alone
    assert (admission.images, admission.bytes) == (0, 0)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 202),
        ({"Origin": "http://127.0.0.1:8000"}, 202),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 202),
        ({"Host": "[::1]:8000"}, 202),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:9000"}, 403),
        ({"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}, 403),
        ({"Host": "[", "Origin": "http://["}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_pages_of_other_sites_start_no_job(bundle: Path, headers: dict[str, str], status: int) -> None:
    submitted = []

    async def submit(asked: dict[str, Any], _key: str | None) -> dict[str, Any]:
        submitted.append(asked)
        return {"id": "a"}

    service = InsideService(str(bundle), jobs=Jobs(submit=submit))
    headers = {"Content-Type": "application/json"} | headers
    answer = service.ask("POST", "/v1/jobs", content=b'{"input": "a", "output": "b"}', headers=headers)
    assert (answer.status_code, len(submitted)) == (status, status == 202)


def test_with_tokens_any_name_will_do(bundle: Path) -> None:
    from serving.config import digest

    service = InsideService(str(bundle), token_digests=[digest("one")])
    headers = {"Authorization": "Bearer one", "Host": "saliency.example", "Origin": "https://front.example"}
    assert service.ask("GET", "/v1/models", headers=headers).status_code == 200


def test_every_refusal_is_counted_once_under_its_kind(
    bundle: Path, jpeg: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from serving.config import digest

    service = InsideService(str(bundle), token_digests=[digest("one")], max_body_bytes=5000)
    known = {"Authorization": "Bearer one"}
    service.ask("POST", "/v1/saliency", content=b"x")
    service.ask("POST", "/v1/saliency", content=b"x" * 5001, headers=known)
    service.ask("POST", "/v1/saliency", content=b"no image", headers=known)
    files = [("i", ("a", jpeg(1))), ("i", ("b", b"no image"))]
    assert service.ask("POST", "/v1/saliency", files=files, headers=known).status_code == 200
    service.ask("GET", "/nowhere", headers=known)
    service.ask("PUT", "/v1/saliency", headers=known)
    service.ask("POST", "/v1/saliency?topk=0", headers=known)

    async def broken(_picture: Any) -> None:
        raise RuntimeError("the engine says /secret/path")

    monkeypatch.setattr(service.models.default, "infer", broken)
    with caplog.at_level(logging.ERROR):
        logging.getLogger("ray.serve").addHandler(caplog.handler)
        headers = known | {"X-Request-Id": "number 7"}
        answer = service.ask("POST", "/v1/saliency", content=jpeg(1), headers=headers)
        logging.getLogger("ray.serve").removeHandler(caplog.handler)
    assert (answer.status_code, answer.headers["X-Request-Id"]) == (500, "number 7")
    assert "secret" not in answer.text
    assert "number 7" in answer.text
    assert "request number 7 failed" in caplog.text
    assert service.errors() == {
        "unauthorised": 1, "too_large": 1, "undecodable": 2, "not_found": 1, "method_not_allowed": 1, "bad_request": 1,
        "internal": 1,
    }  # fmt: skip


def test_health_says_when_the_engine_fails(
    bundle: Path, jpeg: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = InsideService(str(bundle))
    found = service.models.default.predictor
    infer = found.engine.infer

    def broken(_pixels: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(found.engine, "infer", broken)
    for _ in range(predictor.FAILURES):
        assert service.ask("GET", "/healthz").json()["status"] == "ok"
        assert service.ask("POST", "/v1/saliency", content=jpeg(1)).status_code == 500
    answer = service.ask("GET", "/healthz")
    assert (answer.status_code, answer.json()["status"]) == (503, "failing")
    assert answer.json()["message"] == "the last 3 batches failed"
    monkeypatch.setattr(found.engine, "infer", infer)
    assert service.ask("POST", "/v1/saliency", content=jpeg(1)).status_code == 200
    assert service.ask("GET", "/healthz").status_code == 200


@pytest.mark.parametrize("stage", ["decode", "infer"])
def test_health_says_when_a_thread_hangs(
    bundle: Path, jpeg: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    service = InsideService(str(bundle), timeout_s=0.2)
    found = service.models.default.predictor
    monkeypatch.setattr(predictor, "STUCK_SECONDS", 0.1)
    monkeypatch.setattr(found, {"decode": "_decode", "infer": "_run"}[stage], lambda *_: time.sleep(1))
    assert service.ask("POST", "/v1/saliency", content=jpeg(1)).status_code == 503
    answer = service.ask("GET", "/healthz")
    assert (answer.status_code, answer.json()["message"]) == (503, f"one {stage} has taken longer than 0 s")


def test_the_document_names_every_answer(bundle: Path) -> None:
    paths = InsideService(str(bundle)).app.openapi()["paths"]
    said = {
        (method, path): set(what["responses"]) for path, methods in paths.items() for method, what in methods.items()
    }
    image = {"200", "400", "401", "403", "406", "413", "422", "429", "500", "503"}
    assert said["post", "/v1/saliency"] == image
    assert said["post", "/v1/models/{name}/saliency"] == image | {"404"}
    assert said["post", "/v1/jobs"] == {
        "202", "400", "401", "403", "409", "413", "415", "422", "429", "500", "503",
    }  # fmt: skip
    assert said["get", "/v1/jobs"] == {"200", "401", "403", "500", "503"}
    assert said["delete", "/v1/jobs/{name}"] >= {"200", "404", "503"}
    assert "503" in said["get", "/healthz"]


def test_the_document_says_where_a_token_is_needed(bundle: Path) -> None:
    from serving.config import digest

    document = InsideService(str(bundle), token_digests=[digest("one")]).app.openapi()
    ((name, scheme),) = document["components"]["securitySchemes"].items()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert document["security"] == [{name: []}]
    assert document["paths"]["/healthz"]["get"]["security"] == []
    assert "401" not in document["paths"]["/healthz"]["get"]["responses"]
    assert InsideService(str(bundle)).app.openapi()["security"] == []


def test_an_overlay_as_strong_as_is_asked_for(bundle: Path, jpeg: Callable[[int], bytes]) -> None:
    service, data = InsideService(str(bundle)), jpeg(1)

    def drawn(**wish: str) -> np.ndarray:
        answer = service.ask("POST", "/v1/saliency", content=data, params=wish, headers={"Accept": "image/png"})
        assert answer.status_code == 200, answer.text
        return cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR)

    plain = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert np.abs(drawn(opacity="0", box="false").astype(int) - plain).max() <= 2
    assert len({picture.tobytes() for picture in (drawn(), drawn(opacity="0"), drawn(box="false"))}) == 3
    for wrong in ({"opacity": "1.1"}, {"opacity": "nan"}, {"box": "perhaps"}):
        assert service.ask("POST", "/v1/saliency", content=data, params=wrong).status_code == 400


def test_jobs_do_not_say_where_on_the_machine_they_are(bundle: Path) -> None:
    root = "/srv/pictures"

    async def submit(_asked: dict[str, Any], _key: str | None) -> None:
        cause = UsageError(f"--engine {bundle}: damaged; --input {root}/in: no images")
        raise RayTaskError("submit", "Traceback", cause)

    async def get(_name: str) -> dict[str, Any]:
        rows = [{"uri": f"{root}/in/a.jpg", "error": f"unreadable: {root}/in/a.jpg"}]
        return {"id": "a", "done": 1, "message": f"{root} is full", "input": f"{root}/in", "error_rows": rows}

    service = InsideService(str(bundle), jobs=Jobs(submit=submit, get=get), roots=[root, "/mnt"])
    answer = service.ask("POST", "/v1/jobs", json={"input": "in", "output": "out"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        422, f"--engine {bundle.name}: damaged; --input in: no images",
    )  # fmt: skip
    assert service.ask("GET", "/v1/jobs/a").json() == {
        "id": "a", "done": 1, "message": ". is full", "input": "in",
        "error_rows": [{"uri": "in/a.jpg", "error": "unreadable: in/a.jpg"}],
    }  # fmt: skip
