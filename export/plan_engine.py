"""A TensorRT plan behind the `Engine` interface: pinned buffers, and copies that overlap with computing.

Copies overlap where there is more than one batch under way, since images beyond the plan's largest batch are cut up.  What
one batch holds is copied in, computed and copied out, one after the other: parts of it would keep the card less busy.

Every check that can be made without the GPU is made first, so that a misfit is one line with the command that makes a
plan that fits, and not a crash inside the runtime.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.backend import Backend, last_errors, load_backend, native
from export.engine import EngineInfo, as_soft_mask, checked, checked_tensor, info_of
from export.files import file_sha256
from export.gpu import Gpu, gpus
from export.manifest import Manifest, Profile, read_sidecar
from pipeline.errors import UsageError, WorkError

if TYPE_CHECKING:
    from torch import Tensor

SLOTS = 2
"""Sets of buffers: while one batch is computed the next one is copied in and the last one out."""


def check_file(path: Path) -> Manifest:
    """The manifest of a plan that is the file which it describes.

    Raises:
        UsageError: there is no manifest, or another one's.
    """
    manifest = read_sidecar(path)
    if manifest.kind != "tensorrt" or manifest.backend is None or not manifest.profiles:
        raise UsageError(f"{path}.json is no plan's manifest; copy the plan's own beside it")
    if path.stat().st_size != manifest.build.get("bytes"):
        raise UsageError(
            f"{path} has {path.stat().st_size} bytes, its manifest says {manifest.build.get('bytes')}: it is truncated "
            f"or of another build; copy it again, or rebuild it with '{manifest.rebuild}'"
        )
    if file_sha256(path) != manifest.engine_sha256:
        raise UsageError(
            f"{path} is not the plan that its manifest describes (other bytes); rebuild it with '{manifest.rebuild}'"
        )
    return manifest


def check_fit(path: Path, manifest: Manifest, version: str, gpu: Gpu | None) -> None:
    """Make sure that a plan runs with a backend of this version on this card.

    Raises:
        UsageError: it does not; says how to build one that does.
    """
    rebuild = f"rebuild it here with '{manifest.rebuild}'"
    built = manifest.versions.get(str(manifest.backend), "unknown")
    compatible = bool(manifest.build.get("version_compatible"))
    if built != version and not (compatible and _version(built) <= _version(version)):
        raise UsageError(f"{path} was built with {manifest.backend} {built}, here is {version}; {rebuild}")
    if gpu is None:
        raise UsageError(
            f"{path} needs an NVIDIA GPU, and this machine shows none; run {path.name}.onnx in ONNX Runtime, or use "
            "a machine with a GPU"
        )
    wanted = manifest.compute_capabilities
    if wanted and gpu.compute_capability not in wanted:
        level = manifest.build.get("hardware_compatibility")
        if not (level == "ampere+" and float(gpu.compute_capability) >= 8.0):
            raise UsageError(
                f"{path} was built for GPUs of compute capability {', '.join(wanted)}, {gpu.name} has "
                f"{gpu.compute_capability}; {rebuild}"
            )
    bound = manifest.backend == "tensorrt" and manifest.build.get("hardware_compatibility", "none") == "none"
    if bound and manifest.gpu != gpu.name:
        raise UsageError(f"{path} was built on {manifest.gpu}, here is {gpu.name}; {rebuild}")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


class PlanEngine:
    """A plan in TensorRT or TensorRT-RTX, whichever built it."""

    info: EngineInfo

    def __init__(self, path: Path, *, manifest: Manifest | None = None, plan: bytes | None = None) -> None:
        """``manifest`` and ``plan``: of an engine that has just been built and is not written yet."""
        if manifest is None:
            manifest = check_file(path)
        assert manifest.backend is not None
        backend = load_backend(manifest.backend)
        check_fit(path, manifest, backend.version, gpus()[0] if gpus() else None)
        self._cuda = _Cuda()
        self._runtime, self._engine = _deserialise(path, path.read_bytes() if plan is None else plan, manifest, backend)
        self._profiles = manifest.profiles
        self._contexts: dict[int, Any] = {}
        self._runs: dict[int, tuple[int, int]] = {}
        """Profile -> event behind its last run, and the stream of it: a context has memory for one run at a time."""
        self._compute = self._cuda.stream()
        most = max(profile.max for profile in self._profiles)
        self.info = info_of(
            manifest,
            path=path,
            sha256=str(manifest.engine_sha256),
            kind="tensorrt",
            provider="tensorrt",
            max_batch=most,
        )
        self._outputs = {
            port.name: (np.dtype(port.dtype), tuple(int(d) for d in port.shape[1:])) for port in manifest.outputs
        }
        shape = tuple(int(d) for d in manifest.inputs[0].shape[1:])
        self._slots = [_Slot(self._cuda, most, shape, self._outputs) for _ in range(SLOTS)]

    def infer(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `export.engine.Engine.infer`."""
        outputs = self.outputs(images)
        return outputs["logits"].astype(np.float32, copy=False), as_soft_mask(outputs["mask"])

    def outputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """See `export.engine.Engine.outputs`.  Batches beyond the plan's largest are cut up and overlapped."""
        images = checked(images, self.info)
        found = {name: np.empty((len(images), *shape), dtype) for name, (dtype, shape) in self._outputs.items()}
        most = self.info.max_batch or len(images)
        waiting: list[tuple[_Slot, int, int]] = []
        for place, start in enumerate(range(0, len(images), most)):
            if len(waiting) == SLOTS:
                self._collect(*waiting.pop(0), found)
            part = images[start : start + most]
            slot = self._slots[place % SLOTS]
            self._start(slot, part)
            waiting.append((slot, start, len(part)))
        for job in waiting:
            self._collect(*job, found)
        return found

    def tensors(self, images: Tensor) -> dict[str, Tensor]:
        """See `export.engine.Engine.tensors`."""
        import torch

        images = checked_tensor(images, self.info, self._cuda.ordinal)
        stream = torch.cuda.current_stream(images.device).cuda_stream
        found: dict[str, list[Tensor]] = {name: [] for name in self._outputs}
        for part in images.split(self.info.max_batch or len(images)):
            batch = served(self._profiles, len(part))
            padded = torch.cat([part, part[:1].expand(batch - len(part), -1, -1, -1)]) if batch > len(part) else part
            room = {
                name: torch.empty((batch, *shape), dtype=getattr(torch, dtype.name), device=images.device)
                for name, (dtype, shape) in self._outputs.items()
            }
            with torch.cuda.device(images.device):  # TensorRT runs on the thread's current one
                self.enqueue(padded.data_ptr(), {k: v.data_ptr() for k, v in room.items()}, batch=batch, stream=stream)
            padded.record_stream(torch.cuda.current_stream(images.device))
            for name, rows in room.items():
                found[name].append(rows[: len(part)])
        return {name: torch.cat(parts) for name, parts in found.items()}

    def enqueue(self, image: int, outputs: Mapping[str, int], *, batch: int, stream: int) -> None:
        """Run on memory that is on the GPU already; nothing is copied, nothing is waited for.

        ``image``: address of ``batch`` (S, S, 3) uint8 images; ``outputs``: name -> address of room for each output;
        ``batch``: a size that one of the profiles covers; ``stream``: CUDA stream, which first waits for whatever
        other stream ran the same profile before.

        Raises:
            UsageError: no profile covers the batch.
            WorkError: TensorRT or CUDA fails.
        """
        profile = self._profile_of(batch)
        done, last = self._runs.get(profile) or (self._cuda.event(), stream)
        if last != stream:
            self._cuda.hold(stream, done)
        context = self._context(profile, stream)
        context.set_input_shape("image", (batch, *(int(d) for d in self.info.manifest["inputs"][0]["shape"][1:])))
        context.set_tensor_address("image", image)
        for name, address in outputs.items():
            context.set_tensor_address(name, address)
        if not context.execute_async_v3(stream):
            raise WorkError(f"{self.info.path}: TensorRT could not run a batch of {batch}; ask python -m export.doctor")
        self._cuda.record(done, stream)
        self._runs[profile] = (done, stream)

    def _start(self, slot: _Slot, part: np.ndarray) -> None:
        batch = served(self._profiles, len(part))  # rows beyond the images are not read
        slot.host_image[: len(part)] = part
        self._cuda.copy_in(slot.device_image, slot.pinned_image, batch * slot.row_bytes, slot.stream)
        self._cuda.order(slot.stream, self._compute)
        self.enqueue(slot.device_image, slot.device_outputs, batch=batch, stream=self._compute)
        self._cuda.order(self._compute, slot.stream)
        for name, size in slot.output_row_bytes.items():
            self._cuda.copy_out(slot.pinned_outputs[name], slot.device_outputs[name], batch * size, slot.stream)

    def _collect(self, slot: _Slot, start: int, count: int, found: dict[str, np.ndarray]) -> None:
        self._cuda.wait(slot.stream)
        for name, rows in found.items():
            rows[start : start + count] = slot.host_outputs[name][:count]

    def _profile_of(self, batch: int) -> int:
        fitting = [k for k, profile in enumerate(self._profiles) if profile.min <= batch <= profile.max]
        if not fitting:
            raise UsageError(f"{self.info.path}: no profile covers a batch of {batch}; {_covered(self._profiles)}")
        return min(fitting, key=lambda k: abs(math.log(self._profiles[k].opt / batch)))

    def _context(self, profile: int, stream: int) -> Any:
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(profile, stream):
                raise WorkError(
                    f"{self.info.path}: no memory for an execution context; give a smaller --batch at build"
                )
            self._contexts[profile] = context
        return self._contexts[profile]


def served(profiles: Sequence[Profile], batch: int) -> int:
    """The smallest batch size from ``batch`` up that a profile covers; the largest of all where none does."""
    sizes = [max(batch, profile.min) for profile in profiles if profile.max >= batch]
    return min(sizes, default=max(profile.max for profile in profiles))


def _covered(profiles: list[Profile]) -> str:
    return "it covers " + ", ".join(f"{profile.min} to {profile.max}" for profile in profiles)


def _deserialise(path: Path, plan: bytes, manifest: Manifest, backend: Backend) -> tuple[Any, Any]:
    """The runtime, which has to outlive the engine, and the engine."""
    runtime = native(backend, "Runtime")
    if manifest.build.get("version_compatible"):
        runtime.engine_host_code_allowed = True  # such plans carry a lean runtime; the hash vouches for the file
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise UsageError(
            f"{path}: {backend.name} {backend.version} cannot load it ({last_errors(backend)}); "
            f"rebuild it here with '{manifest.rebuild}'"
        )
    return runtime, engine


class _Slot:
    """Buffers for one batch under way: pinned on the host, and on the device."""

    def __init__(
        self, cuda: _Cuda, most: int, shape: tuple[int, ...], outputs: dict[str, tuple[np.dtype, tuple[int, ...]]]
    ) -> None:
        self.stream = cuda.stream()
        self.row_bytes = math.prod(shape)
        self.pinned_image, self.host_image = cuda.pinned((most, *shape), np.dtype(np.uint8))
        self.device_image = cuda.device(most * self.row_bytes)
        self.output_row_bytes = {name: math.prod(size) * dtype.itemsize for name, (dtype, size) in outputs.items()}
        self.device_outputs = {name: cuda.device(most * size) for name, size in self.output_row_bytes.items()}
        pinned = {name: cuda.pinned((most, *size), dtype) for name, (dtype, size) in outputs.items()}
        self.pinned_outputs = {name: address for name, (address, _) in pinned.items()}
        self.host_outputs = {name: array for name, (_, array) in pinned.items()}


class _Cuda:
    """The few calls of the CUDA runtime that are needed, with errors as exceptions.

    Memory, streams and events live as long as this, all on the GPU that was current when it was made.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime  # pyright: ignore[reportAttributeAccessIssue]
        except ImportError as error:
            raise UsageError(f"cuda-bindings cannot be imported ({error}); pip install cuda-bindings") from error
        self._runtime = runtime
        self._device: list[int] = []
        self._pinned: list[int] = []
        self._streams: list[int] = []
        self._events: list[int] = []
        self.ordinal = int(self._call("cudaGetDevice"))

    def stream(self) -> int:
        stream = int(self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking))
        self._streams.append(stream)
        return stream

    def device(self, size: int) -> int:
        address = int(self._call("cudaMalloc", size))
        self._device.append(address)
        return address

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, np.ndarray]:
        """Address and view of host memory that the GPU can read directly."""
        size = math.prod(shape) * dtype.itemsize
        address = int(self._call("cudaHostAlloc", size, 0))
        self._pinned.append(address)
        view = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)
        view[...] = 0
        return address, view

    def copy_in(self, target: int, source: int, size: int, stream: int) -> None:
        self._call("cudaMemcpyAsync", target, source, size, self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)

    def copy_out(self, target: int, source: int, size: int, stream: int) -> None:
        self._call("cudaMemcpyAsync", target, source, size, self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)

    def order(self, before: int, after: int) -> None:
        """Whatever is put on ``after`` from now on waits for all that is on ``before``."""
        event = self._call("cudaEventCreateWithFlags", self._runtime.cudaEventDisableTiming)
        self.record(event, before)
        self.hold(after, event)
        self._call("cudaEventDestroy", event)  # takes effect when the event has happened

    def event(self) -> int:
        event = int(self._call("cudaEventCreateWithFlags", self._runtime.cudaEventDisableTiming))
        self._events.append(event)
        return event

    def record(self, event: int, stream: int) -> None:
        """The event happens when all that is on ``stream`` now is done."""
        self._call("cudaEventRecord", event, stream)

    def hold(self, stream: int, event: int) -> None:
        """Whatever is put on ``stream`` from now on waits for ``event``."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def wait(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._runtime, name)(*arguments)
        if int(error):
            reason = self._runtime.cudaGetErrorString(error)[1]
            raise WorkError(f"CUDA: {name} failed: {reason.decode() if isinstance(reason, bytes) else reason}")
        return values[0] if values else None

    def __del__(self) -> None:
        for event in getattr(self, "_events", ()):  # first, and waited for: what is under way uses the memory
            self._runtime.cudaEventSynchronize(event)
            self._runtime.cudaEventDestroy(event)
        for stream in getattr(self, "_streams", ()):
            self._runtime.cudaStreamSynchronize(stream)
            self._runtime.cudaStreamDestroy(stream)
        for address in getattr(self, "_device", ()):
            self._runtime.cudaFree(address)
        for address in getattr(self, "_pinned", ()):
            self._runtime.cudaFreeHost(address)
