"""Settings of the service, who may use it, and what it may be reached from."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import UsageError
from serving.roots import configured_roots

TOKEN_VARIABLE = "ONEPASS_API_TOKEN"  # noqa: S105 - the name of a variable


class LiveConfig(BaseModel):
    """What can be changed while the service runs, through Serve's ``user_config``."""

    model_config = ConfigDict(extra="forbid")

    batch_size: int = Field(default=16, ge=1, le=4096)
    """Images in one call of the engine, at most."""
    batch_wait_ms: float = Field(default=5.0, ge=0, le=10_000)
    """How long the first image of a batch waits for others."""
    max_queue: int = Field(default=64, ge=1)
    """Images that a replica works on or holds at a time; beyond it requests are told to come back (429)."""

    def within(self, most: int) -> Self:
        """These settings with no more than ``most`` images in the queue, and no larger batches than the queue can hold."""
        queue = min(self.max_queue, most)
        return self.model_copy(update={"max_queue": queue, "batch_size": min(self.batch_size, queue)})


def live_settings(arguments: LiveConfig, wanted: dict[str, Any], *, most: int) -> tuple[LiveConfig, str]:
    """The settings that ``user_config`` asks for, as far as they can be met, and what could not be, in a line ("": nothing).

    ``arguments``: the values of what is not named, and of everything when a name or value is wrong.  ``most``: images that the
    deployment's own limits were set for.
    """
    try:
        asked = LiveConfig.model_validate({name: getattr(arguments, name) for name in LiveConfig.model_fields} | wanted)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(LiveConfig.model_fields)
        return arguments, (
            f"user_config is left out, and the arguments hold: {where}: {first['msg']}; the live settings are {known}"
        )
    live = asked.within(most)
    if live == asked:
        return live, ""
    return live, (
        f"user_config: batch_size={asked.batch_size} and max_queue={asked.max_queue} are cut to {live.batch_size} and "
        f"{live.max_queue}; deploy with a larger max_queue in args"
    )


class ServiceConfig(LiveConfig):
    """Arguments of ``serve run serving.app:build key=value``."""

    engine: str
    """Engine file or bundle."""
    models: str = ""
    """Further engines for /v1/models/NAME/saliency: NAME=FILE_OR_BUNDLE, comma-separated."""
    max_models: int = Field(default=2, ge=1)
    """Further engines that a replica holds at a time."""
    reference: str | None = None
    """Bundle whose training masks are the reference for drift, for engines that do not carry it."""
    token_file: str | None = None
    """File of bearer tokens, one a line; also ``ONEPASS_API_TOKEN``."""
    provider: str = "auto"
    replicas: str = "1"
    """Number of replicas, or MIN:MAX to scale on the number of requests under way."""
    cpus: int = Field(default=1, ge=1)
    """CPUs and threads of a replica."""
    gpus: float = Field(default=0.0, ge=0)
    max_body_bytes: int = Field(default=64 << 20, ge=1)
    max_pixels: int = Field(default=100_000_000, ge=1)
    max_images: int = Field(default=32, ge=1)
    """Images in one request."""
    timeout_s: float = Field(default=60.0, gt=0)
    """After so long a request is answered with 503."""
    top_k: int = Field(default=5, ge=1, le=1000)
    max_jobs: int = Field(default=1, ge=1)
    """Batch jobs that run at a time; others wait."""
    roots: list[str] = []
    """What jobs may read and write; made by `build` of ``ONEPASS_ROOTS``."""
    token_digests: list[str] = []
    """SHA-256 of the tokens that are accepted; made by `build`, so that the tokens themselves stay where they are."""

    @model_validator(mode="after")
    def _batches_can_form(self) -> Self:
        if self.batch_size > self.max_queue:
            raise ValueError(
                f"batch_size={self.batch_size} is more than the max_queue={self.max_queue} images that a replica holds, so "
                f"such a batch would never form; give max_queue={4 * self.batch_size}, or smaller batches"
            )
        return self

    def named_engines(self) -> dict[str, str]:
        """Paths of the further engines by name."""
        engines: dict[str, str] = {}
        for part in filter(None, self.models.split(",")):
            name, separator, path = part.partition("=")
            if not separator or not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
                raise UsageError(f"models={self.models}: give NAME=FILE_OR_BUNDLE, comma-separated")
            engines[name] = str(Path(path).expanduser().absolute())
        return engines

    def replica_range(self) -> tuple[int, int]:
        """(fewest, most) replicas."""
        try:
            fewest, _, most = self.replicas.partition(":")
            found = int(fewest), int(most or fewest)
        except ValueError:
            found = (0, 0)
        if not 1 <= found[0] <= found[1]:
            raise UsageError(f"replicas={self.replicas}: give a number such as 2, or a range such as 1:4")
        return found


def parse_config(arguments: dict[str, Any]) -> ServiceConfig:
    """The settings of ``key=value`` arguments.

    Raises:
        UsageError: a key is unknown or a value does not fit, or the engine or the token file is not there.
    """
    try:
        config = ServiceConfig.model_validate(arguments)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise UsageError(first["msg"].removeprefix("Value error, ")) from error
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(name for name in ServiceConfig.model_fields if name not in ("token_digests", "roots"))
        raise UsageError(f"argument {where}: {first['msg']}; the arguments are {known}") from error
    config.replica_range()
    engine = Path(config.engine).expanduser()
    for path in (engine, *map(Path, config.named_engines().values())):
        if not path.exists():
            raise UsageError(f"engine {path}: no such file or bundle; give model.onnx, model.plan or a bundle folder")
    digests = [digest(token) for token in _tokens(config.token_file)]
    made = {
        "engine": str(engine.absolute()),
        "models": ",".join(f"{name}={path}" for name, path in config.named_engines().items()),
        "token_digests": config.token_digests + digests,
        "roots": config.roots or configured_roots(),
    }
    return config.model_copy(update=made)


def _tokens(token_file: str | None) -> list[str]:
    tokens = [os.environ.get(TOKEN_VARIABLE, "").strip()]
    if token_file is not None:
        try:
            lines = Path(token_file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"token_file={token_file}: cannot be read ({error}); give a text file of tokens"
            ) from error
        if not any(line.strip() for line in lines):
            raise UsageError(f"token_file={token_file} holds no token; write one on a line")
        tokens += [line.strip() for line in lines]
    return [token for token in tokens if token]


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def authorised(header: str | None, digests: list[str]) -> bool:
    """Whether an ``Authorization`` header holds one of the tokens; always true where no token is asked for.

    Every digest is compared, each in constant time, so that the answer's timing says nothing about any of them.
    """
    if not digests:
        return True
    scheme, _, token = (header or "").partition(" ")
    given = digest(token.strip())
    matches = [hmac.compare_digest(given, wanted) for wanted in digests]
    return scheme.lower() == "bearer" and any(matches)


def is_loopback(host: str | None) -> bool:
    """Whether a proxy that listens on ``host`` can be reached from this machine only."""
    if host is None:
        return False
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def foreign(host: str | None, origin: str | None) -> str | None:
    """What is wrong, in a line, with a request's ``Host`` and ``Origin`` headers; None for those of this machine's own.

    For a service without tokens: any web page may have its visitor's browser send requests to 127.0.0.1, under a name of the
    page's own that has been pointed there, and no token stops it.  Browsers cannot be made to hide where a page comes from.
    """
    try:
        name = urlsplit(f"//{host or ''}").hostname
    except ValueError:
        name = None
    next_step = f"set {TOKEN_VARIABLE} or token_file= to be reached from elsewhere"
    if not is_loopback(name):
        return f"without tokens this service answers to names of this machine only, such as 127.0.0.1; {next_step}"
    if origin is not None and origin.lower().partition("://")[2] != (host or "").lower():
        return f"without tokens this service answers its own page only, and no other site's; {next_step}"
    return None


def check_exposure(host: str | None, digests: list[str]) -> None:
    """Refuse to be reachable from elsewhere without a token.

    Raises:
        UsageError: it would be.
    """
    if not digests and not is_loopback(host):
        raise UsageError(
            f"the service would listen on {host or 'an unknown address'} without a token; set {TOKEN_VARIABLE} or token_file=, "
            "or listen on 127.0.0.1 (http_options.host in a Serve config file)"
        )
