"""What NVIDIA cards this machine has, asked of the driver itself: no framework has to be imported for it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True)
class Gpu:
    """One card."""

    name: str
    compute_capability: str
    """Such as `8.9`."""
    driver: str
    """The newest CUDA version that the driver supports, such as `13.2`."""


@lru_cache(maxsize=1)
def gpus() -> tuple[Gpu, ...]:
    """The cards that CUDA shows to this process; none where there is no driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count, version = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or cuda.cuDriverGetVersion(ctypes.byref(version)):
        return ()
    return tuple(_describe(cuda, ordinal, version.value) for ordinal in range(count.value))


def _describe(cuda: ctypes.CDLL, ordinal: int, version: int) -> Gpu:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), ordinal)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
    return Gpu(name.value.decode(), f"{major.value}.{minor.value}", f"{version // 1000}.{version % 1000 // 10}")
