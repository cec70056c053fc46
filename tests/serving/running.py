"""Starting and stopping the service as users do: `serve run` in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from serving.proxy import CALLBACK_VARIABLE

TOKEN = "correct horse"


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def start(
    folder: Path, *, host: str = "127.0.0.1", live: dict | None = None, **arguments: object
) -> tuple[subprocess.Popen, str, Path]:
    """A Serve config file and a process that runs it; (process, address, log)."""
    port = free_port()
    application = {"name": "default", "route_prefix": "/", "import_path": "serving.app:build", "args": arguments}
    if live is not None:
        application["deployments"] = [{"name": "saliency", "user_config": live}]
    config = {"proxy_location": "HeadOnly", "http_options": {"host": host, "port": port}, "applications": [application]}
    (folder / "serve.yaml").write_text(json.dumps(config))  # JSON is YAML
    log = folder / "serve.log"
    defaults = {CALLBACK_VARIABLE: "serving.proxy:middlewares", "RAY_SERVE_LOG_TO_STDERR": "1"}
    environment = defaults | os.environ | {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("serve")), "run", "serve.yaml"],
            cwd=folder, stdout=file, stderr=file, env=environment, start_new_session=True,
        )  # fmt: skip
    return process, f"http://127.0.0.1:{port}", log


def stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=40)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
