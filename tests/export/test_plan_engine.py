"""`PlanEngine` with CUDA and TensorRT played by stand-ins: order of work, memory, and what it says when they fail."""

from __future__ import annotations

import ctypes
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from export import plan_engine
from export.backend import Backend
from export.gpu import Gpu
from export.manifest import Manifest, Port, Profile
from export.plan_engine import PlanEngine
from pipeline.errors import UsageError, WorkError

SIDE = 4
CARD = Gpu("NVIDIA L4", "8.9", "13.2")


class FakeCuda:
    """The CUDA runtime: memory is the host's, copies happen at once, and what each piece of work comes after is kept."""

    cudaStreamNonBlocking, cudaEventDisableTiming = 1, 2
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self) -> None:
        self.memory: dict[int, ctypes.Array] = {}
        self.streams: set[int] = set()
        self.events: dict[int, set[int]] = {}
        self.past: defaultdict[int, set[int]] = defaultdict(set)
        self.count = 0
        self.failing = ""

    def number(self) -> int:
        self.count += 1
        return self.count

    def work(self, stream: int) -> tuple[int, set[int]]:
        """Number of a piece of work put on ``stream``, and the numbers of all that is done before it starts."""
        number, before = self.number(), set(self.past[stream])
        self.past[stream].add(number)
        return number, before

    def cudaGetDevice(self) -> tuple[int, int]:
        return 0, 0

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        stream = self.number()
        self.streams.add(stream)
        return 0, stream

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (0,)

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        self.streams.remove(stream)
        return (0,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[int, int]:
        event = self.number()
        self.events[event] = set()
        return 0, event

    def cudaEventRecord(self, event: int, stream: int) -> tuple[int]:
        self.events[event] = set(self.past[stream])
        return (0,)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[int]:
        self.past[stream] |= self.events[event]
        return (0,)

    def cudaEventSynchronize(self, event: int) -> tuple[int]:
        return (0,)

    def cudaEventDestroy(self, event: int) -> tuple[int]:
        del self.events[event]
        return (0,)

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        room = (ctypes.c_uint8 * size)()
        self.memory[ctypes.addressof(room)] = room
        return (2 if self.failing == "cudaMalloc" else 0), ctypes.addressof(room)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        return self.cudaMalloc(size)

    def cudaFree(self, address: int) -> tuple[int]:
        del self.memory[address]
        return (0,)

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        self.work(stream)
        ctypes.memmove(target, source, size)
        return (0,)

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, b"out of memory"


class FakeContext:
    """Logits are the first pixel, the mask is the second; runs are kept with all that comes before them."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.addresses = cuda, {}
        self.shape: tuple[int, ...] = ()
        self.runs: list[tuple[int, set[int]]] = []

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        self.runs.append(self.cuda.work(stream))
        batch = self.shape[0]
        image = as_array(self.addresses["image"], (batch, SIDE * SIDE * 3), np.uint8)
        as_array(self.addresses["logits"], (batch, 1), np.float32)[:] = image[:, :1]
        as_array(self.addresses["mask"], (batch, 1), np.uint8)[:] = image[:, 1:2]
        return True


def as_array(address: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)


class FakeEngine:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.contexts = cuda, []

    def create_execution_context(self) -> FakeContext:
        self.contexts.append(FakeContext(self.cuda))
        return self.contexts[-1]


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        kind="tensorrt", created="2026-01-01T00:00:00+00:00", preset="ca", architecture="torchvision:resnet18",
        bundle_sha256="0" * 64, engine_sha256="1" * 64, opset=20, input_size=SIDE, mask_size=1, geometry="squash",
        inputs=[Port(name="image", dtype="uint8", shape=["batch", SIDE, SIDE, 3])],
        outputs=[
            Port(name="logits", dtype="float32", shape=["batch", 1]), Port(name="mask", dtype="uint8", shape=["batch", 1]),
        ],
        mean=(0, 0, 0), std=(1, 1, 1), class_names=["a"], data_classes=["a"], class_index=[0], backend="tensorrt-rtx",
        profiles=[Profile(min=1, opt=1, max=1), Profile(min=2, opt=4, max=4)], versions={"tensorrt-rtx": "1.7"},
        rebuild="python -m export.trt",
    )  # fmt: skip


@pytest.fixture
def machine(monkeypatch):
    """A machine with a card: ``cuda``, ``engine`` (what a plan becomes), ``backend`` and its ``runtime``."""
    cuda = FakeCuda()
    log = SimpleNamespace(errors=[])
    runtime = SimpleNamespace()
    made = SimpleNamespace(cuda=cuda, engine=FakeEngine(cuda), runtime=runtime)
    runtime.deserialize_cuda_engine = lambda plan: made.engine
    trt = SimpleNamespace(Runtime=lambda log: runtime)
    made.backend = Backend("tensorrt-rtx", trt, "1.7", log)
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=cuda))
    monkeypatch.setattr(plan_engine, "gpus", lambda: (CARD,))
    monkeypatch.setattr(plan_engine, "load_backend", lambda name: made.backend)
    return made


def opened(manifest: Manifest) -> PlanEngine:
    return PlanEngine(Path("model.plan"), manifest=manifest, plan=b"plan")


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 23])
def test_every_row_comes_back_in_its_place(machine, manifest, count):
    images = pictures(count)
    logits, mask = opened(manifest).infer(images)
    assert np.array_equal(logits, images[:, :1, 0, 0]) and mask.dtype == np.float32
    assert np.array_equal(mask[:, 0] * 255, images[:, 0, 0, 1])


def test_one_context_never_runs_twice_at_a_time(machine, manifest):
    engine, images = opened(manifest), pictures(4)
    room = {"logits": np.empty((4, 1), np.float32), "mask": np.empty((4, 1), np.uint8)}
    addresses = {name: array.ctypes.data for name, array in room.items()}
    engine.outputs(pictures(9))  # on the engine's own stream
    for stream in (0, 901, 901, 902, 0):  # a program's streams
        engine.enqueue(images.ctypes.data, addresses, batch=4, stream=stream)
    engine.outputs(images)
    (runs,) = [context.runs for context in machine.engine.contexts if len(context.runs) > 1]
    assert len(runs) == 8
    for (earlier, _), (later, before) in pairwise(runs):
        assert earlier in before, f"run {later} may start before run {earlier} is done"


def test_profiles_do_not_wait_for_each_other(machine, manifest):
    engine, images = opened(manifest), pictures(4)
    room = {"logits": np.empty((4, 1), np.float32), "mask": np.empty((4, 1), np.uint8)}
    addresses = {name: array.ctypes.data for name, array in room.items()}
    for stream, batch in ((901, 4), (902, 1)):
        engine.enqueue(images.ctypes.data, addresses, batch=batch, stream=stream)
    (large,), (small,) = (context.runs for context in machine.engine.contexts)
    assert large[0] not in small[1]


def test_all_is_given_back_at_the_end(machine, manifest):
    engine = opened(manifest)
    engine.outputs(pictures(9))
    assert machine.cuda.streams and machine.cuda.events and machine.cuda.memory
    del engine
    assert not machine.cuda.streams and not machine.cuda.events and not machine.cuda.memory


def test_memory_that_is_not_there_is_said_and_the_rest_given_back(machine, manifest):
    machine.cuda.failing = "cudaMalloc"
    with pytest.raises(WorkError, match="CUDA: cudaHostAlloc failed: out of memory"):
        opened(manifest)


def test_images_on_another_gpu_are_refused(machine, manifest):
    images = SimpleNamespace(
        device=SimpleNamespace(type="cuda", index=1), dtype="torch.uint8", shape=(2, SIDE, SIDE, 3)
    )
    images.contiguous = lambda: images
    with pytest.raises(
        ValueError, match=r"model\.plan runs on GPU 0, the images lie on GPU 1; move them, or use outputs"
    ):
        opened(manifest).tensors(images)  # pyright: ignore[reportArgumentType]


def test_a_runtime_that_cannot_start_is_one_line(machine, manifest):
    def refused(log):
        log.errors.append("createInferRuntime: Error Code 6: API Usage Error (CUDA initialization failure 35)")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    machine.backend.trt.Runtime = refused
    with pytest.raises(UsageError, match=r"cannot make its runtime .*failure 35.*update the driver") as raised:
        opened(manifest)
    assert "\n" not in str(raised.value)


def test_a_plan_that_does_not_load_is_not_explained_by_an_older_error(machine, manifest):
    machine.backend.log.errors.append("an older build's trouble")
    machine.engine = None
    with pytest.raises(UsageError, match=r"cannot load it \(no reason given\); rebuild it here"):
        opened(manifest)
