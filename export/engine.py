"""The one run-time interface: a bundle through torch, an ONNX file through ONNX Runtime, a plan through TensorRT.

`open_engine` either gives an engine that runs where it was asked to, or raises `UsageError` with one line; it never
falls back silently.  Nothing heavy is imported before it is known to be needed: torch only for a bundle.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from export.files import file_sha256
from export.gpu import gpus
from export.manifest import METADATA_KEY, Manifest, parse_manifest
from export.session import ORT_PROVIDERS, Provider, open_session
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["torch", "onnxruntime", "tensorrt"]

PLAN_SUFFIXES = (".plan", ".engine", ".trt")
_ORT_TYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32", "tensor(int64)": "int64"}


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an engine is, for results that name it and for whoever prepares its images."""

    path: str
    sha256: str
    """Of the file, or of a bundle's weights and description."""
    kind: Kind
    provider: str
    """Where it runs: `cpu`, `cuda`, `tensorrt`."""
    input_size: int
    mask_size: int
    geometry: Literal["squash", "crop"]
    class_names: list[str]
    mean: tuple[float, float, float]
    """For information: engines take bytes and normalise inside."""
    std: tuple[float, float, float]
    precision: str
    max_batch: int | None
    """The largest batch that runs in one go; larger ones are cut up. None: no limit."""
    bundle_sha256: str
    manifest: dict[str, Any]
    """The manifest's fields; empty for a bundle."""
    any_size: bool = False
    """Whether it takes images of any size: it resizes inside, or the network runs at theirs."""


class Engine(Protocol):
    """A loaded engine.  One thread at a time may use it."""

    info: EngineInfo

    def infer(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``images``: (N, S, S, 3) uint8 RGB, fitted to the input by ``info.geometry``.

        Returns logits (N, C) float32 and masks (N, h, w) float32 in [0, 1].
        """
        ...

    def outputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Every output of the graph by name, as it is."""
        ...

    def tensors(self, images: Tensor) -> dict[str, Tensor]:
        """`outputs` of ``images`` (N, S, S, 3) uint8 that lie where the engine runs, on the CPU or a GPU.

        Nothing goes through the host; results are ready for whatever torch's current stream does next.
        """
        ...


def open_engine(path: str | Path, *, provider: Provider = "auto", threads: int | None = None) -> Engine:
    """Open a bundle folder, an ``.onnx`` file or a ``.plan`` file.

    ``provider``: where it has to run; ``auto`` takes a GPU where there is one.  ``threads``: CPU threads of one
    inference (default: ``OMP_NUM_THREADS``, else as many as this process may use).

    Raises:
        UsageError: no engine, a damaged or foreign one, or one that does not fit this machine.
    """
    path = Path(path)
    if provider not in ("auto", *ORT_PROVIDERS):
        raise UsageError(f"provider {provider!r}: use auto, cpu, cuda or tensorrt")
    if not path.exists():
        raise UsageError(f"{path}: no such engine; give a bundle folder, an .onnx file or a .plan file")
    if path.is_dir():
        from export.torch_engine import TorchEngine

        return TorchEngine(path, device=torch_device(provider), threads=threads)
    if path.suffix == ".onnx":
        return OnnxEngine(path, provider=provider, threads=threads or default_threads())
    if path.suffix in PLAN_SUFFIXES:
        from export.plan_engine import PlanEngine

        if provider not in ("auto", "tensorrt"):
            raise UsageError(f"{path} is a TensorRT plan and cannot run on the provider {provider}; use auto")
        return PlanEngine(path)
    raise UsageError(f"{path}: unknown kind of engine; give a bundle folder, an .onnx file or a .plan file")


def torch_device(provider: Provider) -> str:
    """The torch device of a provider.

    Raises:
        UsageError: torch does not run there.
    """
    if provider == "tensorrt":
        raise UsageError("a bundle runs in torch; build an engine for TensorRT with 'python -m export.trt'")
    if provider == "cuda" and not gpus():
        raise UsageError("the provider cuda was asked for, but this machine shows no NVIDIA GPU; use cpu or auto")
    return "cuda" if gpus() and provider != "cpu" else "cpu"


def default_threads() -> int:
    """CPU threads that this process may use: ``OMP_NUM_THREADS`` (which Ray sets for its actors), else its cores."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def checked(images: np.ndarray, info: EngineInfo) -> np.ndarray:
    """``images`` as a contiguous array, after making sure that the graph takes them."""
    side = info.input_size
    fits = images.ndim == 4 and images.shape[3] == 3 and images.dtype == np.uint8
    if not fits or not (info.any_size or images.shape[1:3] == (side, side)):
        wanted = "height, width" if info.any_size else f"{side}, {side}"
        raise ValueError(
            f"an engine takes uint8 images (N, {wanted}, 3), not {images.dtype} {images.shape}; "
            "fit them with pipeline.data.geometry.fit"
        )
    return np.ascontiguousarray(images)


def checked_tensor(images: Tensor, info: EngineInfo, gpu: int | None) -> Tensor:
    """``images`` as a contiguous tensor, after making sure that the graph takes them and that they lie where it runs.

    ``gpu``: CUDA's number of the card that an engine on one runs on.
    """
    device, name = images.device.type, str(images.dtype).removeprefix("torch.")
    if device != ("cpu" if info.provider == "cpu" else "cuda"):
        raise ValueError(
            f"{info.path} runs on {info.provider}, the images lie on {device}; move them, or use outputs()"
        )
    if device == "cuda" and images.device.index != gpu:
        raise ValueError(
            f"{info.path} runs on GPU {gpu}, the images lie on GPU {images.device.index}; move them, or use outputs()"
        )
    if (*images.shape[1:], name) != (info.input_size, info.input_size, 3, "uint8"):
        raise ValueError(
            f"an engine takes uint8 images (N, {info.input_size}, {info.input_size}, 3), not {name} {tuple(images.shape)}"
        )
    return images.contiguous()


def as_soft_mask(mask: np.ndarray) -> np.ndarray:
    """A mask output as float32 in [0, 1], whether the graph gives floats or bytes."""
    return mask.astype(np.float32) / 255 if mask.dtype == np.uint8 else mask.astype(np.float32, copy=False)


class OnnxEngine:
    """An exported ONNX file in ONNX Runtime."""

    def __init__(self, path: Path, *, provider: Provider, threads: int, data: bytes | None = None) -> None:
        """``data``: the file's bytes where they are at hand, or not written yet."""
        self._session, used = open_session(path, provider, threads, data)
        manifest = _onnx_manifest(self._session, path)
        _check_ports(self._session, manifest, path)
        sha256 = file_sha256(path) if data is None else hashlib.sha256(data).hexdigest()
        self.info = info_of(manifest, path=path, sha256=sha256, kind="onnxruntime", provider=used)
        self._names = [port.name for port in manifest.outputs]

    def infer(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine.infer`."""
        logits, mask = self._session.run(["logits", "mask"], {"image": checked(images, self.info)})
        return np.asarray(logits), as_soft_mask(np.asarray(mask))

    def outputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """See `Engine.outputs`."""
        found = self._session.run(self._names, {"image": checked(images, self.info)})
        return {name: np.asarray(value) for name, value in zip(self._names, found, strict=True)}

    def tensors(self, images: Tensor) -> dict[str, Tensor]:
        """See `Engine.tensors`; graphs of one image size only."""
        import torch

        images = checked_tensor(images, self.info, gpu=0)  # the provider's default, which is left as it is
        where = (images.device.type, images.device.index or 0)
        binding = self._session.io_binding()
        binding.bind_input("image", *where, np.uint8, tuple(images.shape), images.data_ptr())
        found = {}
        for port in self.info.manifest["outputs"]:
            shape = (len(images), *(int(size) for size in port["shape"][1:]))
            room = torch.empty(shape, dtype=getattr(torch, port["dtype"]), device=images.device)
            binding.bind_output(port["name"], *where, np.dtype(port["dtype"]), shape, room.data_ptr())
            found[port["name"]] = room
        if where[0] == "cuda":  # ONNX Runtime works in a stream of its own
            torch.cuda.current_stream(images.device).synchronize()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return found


def info_of(
    manifest: Manifest, *, path: Path, sha256: str, kind: Kind, provider: str, max_batch: int | None = None
) -> EngineInfo:
    """The description of an engine that has a manifest."""
    return EngineInfo(
        path=str(path),
        sha256=sha256,
        kind=kind,
        provider=provider,
        input_size=manifest.input_size,
        mask_size=manifest.mask_size,
        geometry=manifest.geometry,
        class_names=manifest.class_names,
        mean=manifest.mean,
        std=manifest.std,
        precision=manifest.precision,
        max_batch=max_batch,
        bundle_sha256=manifest.bundle_sha256,
        manifest=manifest.model_dump(),
        any_size=not isinstance(manifest.inputs[0].shape[1], int),
    )


def _onnx_manifest(session: Any, path: Path) -> Manifest:
    remedy = f"export it with 'python -m export.onnx --model BUNDLE --out {path}'"
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise UsageError(f"{path} is an ONNX file of something else (no {METADATA_KEY!r} in its metadata); {remedy}")
    return parse_manifest(text, path, remedy)


def _check_ports(session: Any, manifest: Manifest, path: Path) -> None:
    """Names and types of the graph are those that its manifest states, and masks and logits have the stated sizes."""
    for kind, ports, found in (
        ("input", manifest.inputs, session.get_inputs()),
        ("output", manifest.outputs, session.get_outputs()),
    ):
        stated = [(port.name, port.dtype, [d for d in port.shape if isinstance(d, int)]) for port in ports]
        real = [(f.name, _ORT_TYPES.get(f.type, f.type), [d for d in f.shape if isinstance(d, int)]) for f in found]
        if stated != real:
            raise UsageError(
                f"{path}: its {kind}s are {real}, its manifest states {stated}; the file was changed after its export: "
                f"make it again with '{manifest.rebuild}'"
            )
