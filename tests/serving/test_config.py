"""Settings, tokens, roots and the surface that users script against."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UsageError
from serving import batch
from serving.config import (
    LiveConfig,
    ServiceConfig,
    authorised,
    check_exposure,
    digest,
    is_loopback,
    live_settings,
    parse_config,
)
from serving.roots import OutsideRoots, bounded, configured_roots, outward, within


def test_the_flags_of_batch_are_frozen() -> None:
    flags = {option for action in batch.parser()._actions for option in action.option_strings}
    assert flags == {
        "-h", "--help", "--engine", "--input", "--output", "--batch-size", "--workers", "--cpus-per-worker", "--num-gpus",
        "--decode-cpus", "--autoscale", "--provider", "--shard-size", "--max-pixels", "--column", "--retry-errors",
        "--overlays", "--dry-run", "--status", "--draft", "--new-plan", "--topk",
    }  # fmt: skip


def test_the_arguments_of_the_service_are_frozen() -> None:
    assert set(ServiceConfig.model_fields) == {
        "engine", "models", "max_models", "reference", "provider", "replicas", "cpus", "gpus", "batch_size", "batch_wait_ms",
        "max_queue", "max_body_bytes", "max_pixels", "max_images", "timeout_s", "top_k", "token_file", "max_jobs",
        "token_digests", "roots",
    }  # fmt: skip


def test_arguments_are_text_from_the_command_line(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEPASS_API_TOKEN", "secret")
    (tmp_path / "tokens").write_text("one\n\n two \n")
    config = parse_config(
        {
            "engine": str(bundle),
            "batch_size": "4",
            "replicas": "1:3",
            "token_file": str(tmp_path / "tokens"),
            "models": f"b={bundle}",
        }
    )
    assert (config.batch_size, config.replica_range()) == (4, (1, 3))
    assert config.token_digests == [digest(token) for token in ("secret", "one", "two")]
    assert "secret" not in config.model_dump_json()
    assert config.named_engines() == {"b": str(bundle)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "argument engine: Field required"),
        ({"engine": "/no/where"}, "/no/where: no such file or bundle"),
        ({"engine": "/", "batchsize": "4"}, "argument batchsize: .*the arguments are batch_size, "),
        ({"engine": "/", "batch_size": "0"}, "argument batch_size"),
        ({"engine": "/", "batch_size": "256"}, "batch_size=256 is more than the max_queue=64 .* give max_queue=1024"),
        ({"engine": "/", "max_queue": "8"}, "batch_size=16 is more than the max_queue=8 "),
        ({"engine": "/", "replicas": "3:1"}, "replicas=3:1: give a number"),
        ({"engine": "/", "models": "a/b=/"}, "give NAME=FILE_OR_BUNDLE"),
        ({"engine": "/", "models": "a=/no/where"}, "no such file or bundle"),
        ({"engine": "/", "token_file": "/no/where"}, "token_file=/no/where: cannot be read"),
        ({"engine": "/", "token_file": "/dev/null"}, "holds no token"),
    ],
)
def test_wrong_arguments(arguments: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_config(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "most", "given"),
    [((16, 64), 64, (16, 64)), ((16, 128), 64, (16, 64)), ((100, 64), 64, (64, 64)), ((32, 16), 64, (16, 16))],
)
def test_live_settings_stay_within_what_serve_was_told(
    wanted: tuple[int, int], most: int, given: tuple[int, int]
) -> None:
    live = LiveConfig(batch_size=wanted[0], max_queue=wanted[1]).within(most)
    assert (live.batch_size, live.max_queue) == given


def test_tokens() -> None:
    digests = [digest("one"), digest("two")]
    assert authorised("Bearer two", digests)
    assert authorised("bearer  one ", digests)
    assert authorised(None, [])
    for header in (None, "", "Bearer", "Bearer ", "Bearer three", "one", "Basic one", f"Bearer {digests[0]}"):
        assert not authorised(header, digests)


def test_only_loopback_without_a_token() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "localhost", "::1"):
        assert is_loopback(host)
        check_exposure(host, [])
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", None):
        check_exposure(host, [digest("one")])
        with pytest.raises(UsageError, match="without a token"):
            check_exposure(host, [])


def test_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "ab").mkdir()
    (tmp_path / "a" / "out").symlink_to(tmp_path / "ab")
    monkeypatch.setenv("ONEPASS_ROOTS", f"{tmp_path}/a, s3://bucket/part")
    roots = configured_roots()
    assert bounded("b/x.jpg", roots) == f"{tmp_path}/a/b/x.jpg"
    assert bounded("s3://bucket/part/x", roots) == "s3://bucket/part/x"
    assert within(f"{tmp_path}/a", roots)
    outside = [
        "..",
        f"{tmp_path}/ab",
        "out/x",
        "b/../../ab",
        "s3://bucket/party",
        "s3://bucket/part/../x",
        "s3://other/part/x",
    ]
    for text in [*outside, "http://host/x", "file:///etc/passwd", "/", "a\0b", f"{tmp_path}/a/*/../../ab"]:
        with pytest.raises(OutsideRoots):
            bounded(text, roots)
    monkeypatch.delenv("ONEPASS_ROOTS")
    monkeypatch.chdir(tmp_path)
    assert configured_roots() == [str(tmp_path)]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("/srv/my pictures/in/x.jpg", "in/x.jpg"),
        ("--input /srv/my pictures/in: nothing; delete /srv/my pictures/.onepass-jobs/a.json", "--input in: nothing; delete .onepass-jobs/a.json"),
        ("/srv/my pictures", "."),
        ("'/srv/my pictures/' is full", "'.' is full"),
        ("it is in /srv/my pictures.", "it is in .."),
        ("/srv/my pictures/.x", ".x"),
        ("--output /srv/my pictures: no", "--output .: no"),
        ("/srv/my picturesque/x", "/srv/my picturesque/x"),
        ("/mnt/srv/my pictures/x", "/mnt/srv/my pictures/x"),
        ("s3://bucket/x", "s3://bucket/x"),
    ],
)  # fmt: skip
def test_clients_are_told_places_as_they_may_name_them(text: str, seen: str) -> None:
    assert outward(text, ["/srv/my pictures", "/mnt"]) == seen
    assert outward(text, ["/"]) == outward(text, []) == text
    assert outward("s3://bucket/x", ["s3://bucket"]) == "s3://bucket/x"


def test_a_wish_that_cannot_be_met_leaves_the_service_running() -> None:
    """A replica that raised over its user_config would be ended, and its successors with it."""
    now = LiveConfig(batch_size=8, max_queue=32)
    live, amiss = live_settings(now, {"batch_size": 16, "batch_wait_ms": 1}, most=32)
    assert (live.batch_size, live.batch_wait_ms, live.max_queue, amiss) == (16, 1.0, 32, "")
    live, amiss = live_settings(now, {"max_queue": 100}, most=32)
    assert live.max_queue == 32 and "are cut to" in amiss
    for wrong in ({"batch_size": 0}, {"batchsize": 4}, {"max_queue": "many", "batch_size": 4}):
        live, amiss = live_settings(now, wrong, most=32)
        assert live is now and "user_config is left out" in amiss and any(name in amiss for name in wrong)
