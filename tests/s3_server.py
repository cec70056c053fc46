"""An S3 server on loopback for the tests, which can be told to fail now and then."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from s3fs import S3FileSystem


class Faults:
    """What the server does to the requests of objects, in order: every ``every``-th one fails in one way or another."""

    def __init__(self) -> None:
        self.every = 0
        self.count = 0
        self.done: dict[str, int] = {"500": 0, "slow": 0, "dropped": 0}
        self._lock = threading.Lock()

    def next(self) -> str | None:
        with self._lock:
            self.count += 1
            if not self.every or self.count % self.every:
                return None
            kind = ("500", "dropped", "slow")[self.count // self.every % 3]
            self.done[kind] += 1
            return kind


class Faulty:
    """A WSGI application with faults in front of it."""

    def __init__(self, application: Any, faults: Faults) -> None:
        self.application, self.faults = application, faults

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        fault = self.faults.next()
        if fault == "500":
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        if fault == "dropped":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        if fault == "slow":
            time.sleep(0.5)
        return self.application(environ, start_response)


@contextmanager
def s3_server(faults: Faults | None = None) -> Iterator[dict[str, str]]:
    """Within: a server, and the environment variables that clients find it by, which it yields."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = Faulty(DomainDispatcherApplication(create_backend_app), faults or Faults())
    server = make_server("127.0.0.1", 0, application, threaded=True)  # type: ignore[arg-type]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    S3FileSystem.clear_instance_cache()  # fsspec keeps clients, and these know another server's address
    yield settings
    server.shutdown()
    S3FileSystem.clear_instance_cache()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
