"""An ONNX Runtime session on the provider that was asked for, or an error: ONNX Runtime itself falls back silently."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from export.gpu import gpus
from export.placement import RECORD_PLACEMENT, check_placement
from export.saturation import sums_saturate
from pipeline.errors import UsageError

if TYPE_CHECKING:
    import onnx

Provider = Literal["auto", "cpu", "cuda", "tensorrt"]

ORT_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_TAIL = 1 << 20
_SOURCE = re.compile(r"/\S+\.cc:\d+ [^)]*\) ")
"""Where in ONNX Runtime's sources an error was raised."""


def open_session(path: Path, provider: Provider, threads: int, data: bytes | None) -> tuple[Any, str]:
    """An ONNX Runtime session of a graph (the file ``path``, or its bytes), and the short name of its provider.

    Raises:
        UsageError: it cannot be loaded, or not all of it runs on the wanted provider.
    """
    import onnxruntime

    wanted = ("cuda" if gpus() else "cpu") if provider == "auto" else provider
    if wanted != "cpu" and not gpus():
        raise UsageError(f"the provider {wanted} was asked for, but this machine shows no NVIDIA GPU; use cpu or auto")
    if wanted != "cpu" and ORT_PROVIDERS[wanted] not in onnxruntime.get_available_providers():
        raise UsageError(f"this ONNX Runtime has no provider {wanted}; install onnxruntime-gpu, or use cpu")
    if wanted != "cpu":
        onnxruntime.preload_dlls()  # CUDA's libraries come with torch's wheels and are not on the search path
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin while they wait take the cores away from decoding: 3 times slower beside one busy process.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(RECORD_PLACEMENT, "0" if wanted == "cpu" else "1")
    # It would quantise, with one scale for all channels, what was kept in float32 between two quantised layers.
    options.add_session_config_entry("optimization.disable_specified_optimizers", "WeightBiasQuantization")
    precision = precision_of(path, data)
    if precision in ("int8", None) and wanted == "cpu" and sums_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if precision == "fp8":  # its optimiser takes fp8 for int8 when it fuses: other masks, and no error
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    chain = {"cpu": ["cpu"], "cuda": ["cuda", "cpu"], "tensorrt": ["tensorrt", "cuda", "cpu"]}[wanted]
    # By default a GPU multiplies float32 in TF32, with 10 bits of mantissa.  The provider tensorrt cannot be told not to.
    exact = {"cuda": {"use_tf32": "0"}}
    try:
        session = onnxruntime.InferenceSession(
            str(path) if data is None else data,
            options,
            providers=[(ORT_PROVIDERS[name], exact.get(name, {})) for name in chain],
            enable_fallback=0,  # or a failure, also of a later run, would be repeated on the CPU
        )
    except Exception as error:  # ONNX Runtime's exceptions have no public base but Exception
        reason = _SOURCE.sub("", " ".join(str(error).split()))[:200]
        if wanted == "cpu" and precision == "bf16":
            raise UsageError(
                f"{path} is bf16, for which ONNX Runtime has kernels on a GPU only; run the fp32 or the int8-cpu graph "
                "here ('python -m export.parity' judges this one by emulation)"
            ) from error
        if wanted != "cpu":
            raise UsageError(
                f"{path}: ONNX Runtime cannot load it on the provider {wanted} ({reason}); its libraries are missing or of "
                "another version, or the graph is damaged: --provider cpu tells which"
            ) from error
        raise UsageError(
            f"{path}: ONNX Runtime cannot load it ({reason}); it is damaged or needs another provider: "
            "export it again with 'python -m export.onnx', or ask 'python -m export.doctor'"
        ) from error
    used = session.get_providers()[0]
    if used != ORT_PROVIDERS[wanted]:
        raise UsageError(
            f"{path}: the provider {wanted} was asked for, but ONNX Runtime chose {used} (its libraries are missing or "
            "of another version; it says which on stderr); install them, or use cpu"
        )
    if wanted != "cpu":
        check_placement(session, used, path, lambda: _graph(path, data))
    return session, wanted


def _graph(path: Path, data: bytes | None) -> onnx.ModelProto:
    import onnx

    return onnx.load(path) if data is None else onnx.load_model_from_string(data)


def precision_of(path: Path, data: bytes | None = None) -> str | None:
    """The precision that an ONNX file's manifest states, asked before anything parses the file: it stands at the end."""
    if data is None:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - _TAIL, 0))
            data = file.read()
    found = re.search(rb'"precision":"(\w+)"', data[-_TAIL:])
    return found[1].decode() if found else None
