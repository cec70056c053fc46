"""The service as users start it: `serve run` in a process of its own, spoken to over HTTP."""

from __future__ import annotations

import base64
import csv
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest

from serving import codec
from serving.scorer import ScorerConfig, ShardScorer
from tests.serving.reading import read_scores
from tests.serving.running import TOKEN, start, stop


def test_every_sample_gets_the_numbers_of_batch_scoring(service: httpx.Client, bundle: Path, shared_dir: Path) -> None:
    source = shared_dir / "data" / "sample_images"
    scorer = ShardScorer(
        ScorerConfig(
            engine=str(bundle), engine_sha256=service.get("/healthz").json()["engine"], output="/none", version="v"
        )
    )
    for entry in csv.DictReader((source / "manifest.csv").open(encoding="utf-8")):
        data = (source / entry["file"]).read_bytes()
        answer = service.post("/v1/saliency", content=data)
        fields = answer.json()
        if entry["expected"].startswith("error"):
            too_many = "too_many_pixels" in entry["expected"]
            assert (answer.status_code, fields["error"]["kind"]) == (
                (413, "too_many_pixels") if too_many else (422, "undecodable")
            )
        elif entry["expected"].startswith("either") and answer.status_code != 200:
            assert (answer.status_code, fields["error"]["kind"]) == (422, "undecodable"), entry["file"]
            assert "error" in scorer.score_bytes(entry["file"], data)["status"]
        else:
            assert answer.status_code == 200, (entry["file"], fields)
            row = scorer.score_bytes(entry["file"], data)
            assert set(fields) == {
                "label", "class_name", "score", "topk", "box", "view", "area", "width", "height", "mask", "engine",
            }  # fmt: skip
            for name in ("label", "class_name", "width", "height", "view", "engine"):
                assert fields[name] == row[name], (entry["file"], name)
            assert fields["score"] == pytest.approx(row["score"], abs=1e-5)
            assert fields["area"] == pytest.approx(row["area"], abs=1e-4), entry["file"]
            assert fields["box"] == pytest.approx(row["box"], abs=1e-6), entry["file"]
            mask = codec.decode_mask(base64.b64decode(fields["mask"])).astype(int)
            assert np.abs(mask - codec.stored(row)).max() <= 1
            assert fields["topk"][0] == {name: fields[name] for name in ("label", "class_name", "score")}
            assert len(fields["topk"]) == 5
            form = service.post("/v1/saliency", files={"image": (Path(entry["file"]).name, data)}).json()
            assert {name: form[name] for name in ("label", "box", "view")} == {
                name: fields[name] for name in ("label", "box", "view")
            }, entry["file"]


def test_several_images_in_one_form(service: httpx.Client, jpeg: Callable[[int], bytes]) -> None:
    files = [("image", ("a.jpg", jpeg(1), "image/jpeg")), ("other", ("b", b"no image")), ("image", ("c", jpeg(2)))]
    answer = service.post("/v1/saliency", files=files, data={"comment": "not a file"})
    assert answer.status_code == 200
    first, second, third = answer.json()
    assert second["error"]["kind"] == "undecodable"
    assert first["label"] == service.post("/v1/saliency", content=jpeg(1)).json()["label"]
    assert third["width"] == 80
    assert isinstance(service.post("/v1/saliency", files=files[:1]).json(), dict)


def test_another_engine_by_name(service: httpx.Client, other_bundle: Path, jpeg: Callable[[int], bytes]) -> None:
    from pipeline.bundle import bundle_sha256

    assert service.get("/v1/models").json() == ["second"]
    other = service.post("/v1/models/second/saliency", content=jpeg(1)).json()
    mine = service.post("/v1/saliency", content=jpeg(1)).json()
    assert other["engine"] == bundle_sha256(other_bundle) != mine["engine"]
    assert other["mask"] != mine["mask"]
    assert service.post("/v1/models/third/saliency", content=jpeg(1)).status_code == 404
    assert service.get("/v1/models/second/saliency").status_code == 405


def test_overlay_by_accept(service: httpx.Client, jpeg: Callable[[int], bytes]) -> None:
    answer = service.post("/v1/saliency", content=jpeg(1), headers={"Accept": "image/png"})
    assert answer.headers["content-type"] == "image/png"
    assert cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR).shape == (60, 80, 3)
    for accept in ("*/*", "application/json, image/png", "text/html,image/avif,*/*;q=0.8"):
        assert service.post("/v1/saliency", content=jpeg(1), headers={"Accept": accept}).json()["width"] == 80


@pytest.mark.parametrize(
    ("request_", "status", "kind"),
    [
        ({"content": b""}, 422, "undecodable"),
        ({"content": b"x" * 2_000_001}, 413, "too_large"),
        ({"files": [("i", (f"{k}", b"x")) for k in range(5)]}, 413, "too_many_images"),
        ({"files": {}, "data": {"a": "b"}}, 422, "undecodable"),
        ({"content": b"--", "headers": {"Content-Type": "multipart/form-data"}}, 400, "bad_form"),
        ({"content": b"", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 422, "no_image"),
        ({"content": b"x", "params": {"topk": "0"}}, 400, "bad_request"),
        ({"content": b"x", "headers": {"Authorization": "Bearer wrong"}}, 401, "unauthorised"),
        ({"content": b"x", "headers": {"Authorization": TOKEN}}, 401, "unauthorised"),
    ],
)
def test_what_is_refused(service: httpx.Client, request_: dict, status: int, kind: str) -> None:
    answer = service.post("/v1/saliency", **request_)
    assert (answer.status_code, answer.json()["error"]["kind"]) == (status, kind)
    assert "Traceback" not in answer.text


def test_a_body_of_unknown_length_is_read_no_further_than_allowed(service: httpx.Client) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(40):
            sent += 1
            yield b"x" * 100_000

    assert service.post("/v1/saliency", content=chunks()).status_code == 413


def test_other_routes(service: httpx.Client) -> None:
    plain = httpx.Client(base_url=service.base_url)
    assert plain.get("/healthz").json()["status"] == "ok"
    page = plain.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "https://" not in page.text
    assert plain.get("/app.js").status_code == plain.get("/app.css").status_code == 200
    assert plain.get("/metrics").status_code == 401
    assert plain.get("/openapi.json").status_code == 401
    assert "/v1/saliency" in service.get("/openapi.json").json()["paths"]
    assert service.get("/no").json()["error"]["kind"] == "not_found"
    assert service.put("/v1/saliency").json()["error"]["kind"] == "method_not_allowed"
    metrics = service.get("/metrics").text
    for name in (
        "requests_total",
        "images_total",
        "batch_size_bucket",
        "mask_entropy_sum",
        'errors_total{kind="undecodable"',
    ):
        assert f"onepass_{name}" in metrics


def test_batches_form_and_too_many_at_once_are_told_to_come_back(
    service: httpx.Client, jpeg: Callable[[int], bytes]
) -> None:
    data = jpeg(3)
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: service.post("/v1/saliency", content=data), range(96)))
    codes = {answer.status_code for answer in answers}
    assert codes <= {200, 429}
    assert 200 in codes
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["Retry-After"]) >= 1
    text = service.get("/metrics").text
    reached = [
        line for line in text.splitlines() if line.startswith("onepass_batch_size_bucket") and 'le="2.0"' in line
    ]
    batches = [line for line in text.splitlines() if line.startswith("onepass_batch_size_count")]
    assert float(reached[0].split()[-1]) < float(batches[0].split()[-1])
    # Some batches held more than the two images of the argument: as many as user_config allows.


def test_without_a_token_only_loopback(bundle: Path, tmp_path: Path) -> None:
    process, address, log = start(tmp_path, host="0.0.0.0", engine=str(bundle))
    try:
        deadline = time.time() + 100
        while "without a token" not in log.read_text() and process.poll() is None and time.time() < deadline:
            time.sleep(0.2)
        assert "without a token" in log.read_text()
        with pytest.raises((httpx.TransportError, AssertionError)):
            assert httpx.post(f"{address}/v1/saliency", content=b"x").status_code < 404
    finally:
        stop(process)


def wait_for(service: httpx.Client, name: str, states: set[str], *, seconds: float = 150) -> dict:
    deadline = time.time() + seconds
    while (job := service.get(f"/v1/jobs/{name}").json())["state"] not in states:
        assert time.time() < deadline, job
        time.sleep(0.3)
    return job


def test_a_job_from_start_to_end(service: httpx.Client, roots: Path, shared_dir: Path) -> None:
    (roots / "list.txt").write_text(
        f"in/00000.jpg\n{shared_dir}/data/sample_images/rise_goldfish.jpg\nin/gone.jpg\nhttp://127.0.0.1:1/x.jpg\n"
    )
    asked = {"input": "list.txt", "output": "out", "batch_size": 4}
    answer = service.post("/v1/jobs", json=asked, headers={"Idempotency-Key": "one"})
    assert answer.status_code == 202
    name = answer.json()["id"]
    assert answer.json()["state"] in ("queued", "running")
    assert service.post("/v1/jobs", json=asked, headers={"Idempotency-Key": "one"}).json()["id"] == name
    again = service.post("/v1/jobs", json=asked | {"batch_size": 5}, headers={"Idempotency-Key": "one"})
    assert (again.status_code, again.json()["error"]["kind"]) == (409, "conflict")
    job = wait_for(service, name, {"done", "failed"})
    assert (job["state"], job["total"], job["done"], job["errors"], job["seconds_left"]) == ("done", 4, 4, 3, 0)
    assert (job["input"], job["output"]) == ("list.txt", "out")
    assert str(roots) not in str(job)
    assert [row["error"].partition(":")[0] for row in job["error_rows"]] == ["unreadable"] * 3
    assert sum("outside the roots" in row["error"] for row in job["error_rows"]) == 2
    assert read_scores(roots / "out").num_rows == 4
    assert name in [listed["id"] for listed in service.get("/v1/jobs").json()]


def test_a_running_job_can_be_cancelled_and_goes_on_when_it_is_sent_again(
    service: httpx.Client, roots: Path, jpeg: Callable[[int], bytes]
) -> None:
    (roots / "many").mkdir()
    for k in range(300):
        (roots / "many" / f"{k}.jpg").write_bytes(jpeg(k % 7))
    body = {"input": "many", "output": "stopped", "shard_size": 4}
    name = service.post("/v1/jobs", json=body).json()["id"]

    deadline = time.time() + 150
    while not (job := service.get(f"/v1/jobs/{name}").json()).get("done"):
        assert time.time() < deadline and job["state"] in ("queued", "running"), job
        time.sleep(0.1)
    assert service.delete(f"/v1/jobs/{name}").json()["state"] == "cancelled"
    time.sleep(3)
    job = service.get(f"/v1/jobs/{name}").json()
    files = sorted((roots / "stopped").glob("*.parquet"))
    assert job["state"] == "cancelled" and 0 < job["done"] < 300 and files
    time.sleep(2)
    assert sorted((roots / "stopped").glob("*.parquet")) == files, "nothing of it works on"
    again = wait_for(service, service.post("/v1/jobs", json=body).json()["id"], {"done", "failed"})
    assert (again["state"], again["done"], again["total"]) == ("done", 300, 300)
    uris = read_scores(roots / "stopped").column("uri").to_pylist()
    assert len(uris) == len(set(uris)) == 300


def test_a_job_can_be_cancelled(service: httpx.Client, roots: Path) -> None:
    name = service.post("/v1/jobs", json={"input": "in", "output": "cancelled", "shard_size": 1}).json()["id"]
    assert service.delete(f"/v1/jobs/{name}").json()["state"] == "cancelled"
    assert service.get(f"/v1/jobs/{name}").json()["state"] == "cancelled"
    assert service.delete(f"/v1/jobs/{name}").json()["state"] == "cancelled"


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"input": "/etc", "output": "out2"}, 403, "outside_roots"),
        ({"input": "in", "output": "../out"}, 403, "outside_roots"),
        ({"input": "in/../../..", "output": "out2"}, 403, "outside_roots"),
        ({"input": "away", "output": "out2"}, 403, "outside_roots"),
        ({"input": "s3://bucket/x", "output": "out2"}, 403, "outside_roots"),
        ({"input": "file:///etc/passwd", "output": "out2"}, 403, "outside_roots"),
        ({"input": "nothing", "output": "out2"}, 422, "bad_request"),
        ({"input": "in"}, 422, "bad_request"),
        ({"input": "in", "output": "out2", "engine": "/etc/passwd"}, 422, "bad_request"),
        ([], 422, "bad_request"),
    ],
)
def test_jobs_that_are_refused(service: httpx.Client, roots: Path, body: object, status: int, kind: str) -> None:
    answer = service.post("/v1/jobs", json=body)
    assert (answer.status_code, answer.json()["error"]["kind"]) == (status, kind), answer.text
    assert not (roots / "out2").exists()


def test_no_such_job(service: httpx.Client) -> None:
    for name in ("nothing", "..%2F..%2Fetc", "%00"):
        assert service.get(f"/v1/jobs/{name}").status_code == 404
