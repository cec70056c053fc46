"""TensorRT and TensorRT-RTX behind one name: which is there, its version, and its log.

Both have the same strongly typed interface (TensorRT 10.13 and later, 11.x, TensorRT-RTX 1.x): precision lives in the
graph, and no flag of the builder names one.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from export.gpu import gpus
from pipeline.errors import UsageError

BackendName = Literal["tensorrt", "tensorrt-rtx"]

_MODULES: dict[BackendName, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
LEAST_TENSORRT = (10, 13)


@dataclass(frozen=True)
class Backend:
    """An imported backend."""

    name: BackendName
    trt: Any
    """The module."""
    version: str
    log: Any
    """Its logger; ``log.errors`` holds what went wrong since it was cleared."""


def load_backend(name: BackendName | Literal["auto"] = "auto") -> Backend:
    """Import a backend.  ``auto``: TensorRT where there is a GPU for it (it cannot build without), else TensorRT-RTX.

    Raises:
        UsageError: it is not installed, cannot be loaded, or is too old.
    """
    if name != "auto":
        return _load(name)
    order: tuple[BackendName, ...] = ("tensorrt", "tensorrt-rtx") if gpus() else ("tensorrt-rtx", "tensorrt")
    reasons = []
    for candidate in order:
        try:
            return _load(candidate)
        except UsageError as error:
            reasons.append(str(error))
    raise UsageError("; ".join(reasons))


@lru_cache(maxsize=2)
def _load(name: BackendName) -> Backend:
    remedy = "pip install tensorrt-rtx" if name == "tensorrt-rtx" else "pip install 'onepass-saliency[tensorrt]'"
    try:
        trt = importlib.import_module(_MODULES[name])
    except ImportError as error:
        raise UsageError(f"{name} cannot be imported ({' '.join(str(error).split())}); {remedy}") from error
    version = str(trt.__version__)
    if name == "tensorrt" and tuple(int(part) for part in version.split(".")[:2]) < LEAST_TENSORRT:
        raise UsageError(f"tensorrt {version} is too old for strongly typed networks; install 10.13 or later")

    class Log(trt.ILogger):
        """Keeps errors and warnings instead of printing them."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(message)

    return Backend(name, trt, version, Log())


def native(backend: Backend, kind: Literal["Builder", "Runtime"]) -> Any:
    """A builder or a runtime of the backend, with a log that holds its errors alone.

    Raises:
        UsageError: CUDA does not start here.
    """
    backend.log.errors.clear()
    try:
        return getattr(backend.trt, kind)(backend.log)
    except (TypeError, RuntimeError) as error:  # the binding's words for a constructor that gave nothing
        reason = last_errors(backend) if backend.log.errors else " ".join(str(error).split())[:240]
        raise UsageError(
            f"{backend.name} {backend.version} cannot make its {kind.lower()} ({reason}): mostly the NVIDIA driver is older "
            "than its CUDA; update the driver ('nvidia-smi' shows it), or install an older release of the backend"
        ) from error


def last_errors(backend: Backend, most: int = 2) -> str:
    """The latest errors of the log in one line."""
    texts = [" ".join(text.split())[:240] for text in backend.log.errors[-most:]]
    return " | ".join(texts) or "no reason given"
