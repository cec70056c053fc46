"""`export.build` with a TensorRT that keeps what it is told: the branch that no machine without its library can run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from export import build as building
from export.backend import Backend, load_backend
from export.build import BuildConfig, build, check_config
from export.gpu import Gpu
from export.judged import serialise
from export.manifest import Profile
from pipeline.errors import UsageError, WorkError

ONE = (Profile(min=1, opt=1, max=1),)
CARD = Gpu("NVIDIA L4", "8.9", "13.2")


class FakeSettings:
    """A builder's configuration that only keeps what it is given."""

    def __init__(self) -> None:
        self.flags, self.pools, self.profiles = {"TF32"}, {}, []
        self.cache: Any = None
        self.cache_fits = True

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.pools[pool] = size

    def add_optimization_profile(self, profile: Any) -> None:
        self.profiles.append(profile)

    def create_timing_cache(self, data: bytes) -> Any:
        return SimpleNamespace(data=data, serialize=lambda: data + b" and more")

    def set_timing_cache(self, cache: Any, *, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache if self.cache_fits else None
        return self.cache_fits

    def get_timing_cache(self) -> Any:
        return self.cache


class FakeShapes:
    """An optimisation profile: the shapes of its one input."""

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.name, self.shapes = name, shapes


class FakeTensorRT:
    """TensorRT as far as `build` needs it; a graph of one image size is built into ``plan``."""

    BuilderFlag = SimpleNamespace(TF32="TF32", VERSION_COMPATIBLE="VERSION_COMPATIBLE", REFIT="REFIT")
    MemoryPoolType = SimpleNamespace(WORKSPACE="WORKSPACE")
    HardwareCompatibilityLevel = SimpleNamespace(
        SAME_COMPUTE_CAPABILITY="SAME_COMPUTE_CAPABILITY", AMPERE_PLUS="AMPERE_PLUS"
    )
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)

    def __init__(self) -> None:
        self.settings, self.plan = FakeSettings(), b"plan"
        self.network_flags = 0

    def Builder(self, log: Any) -> Any:
        return SimpleNamespace(
            create_network=self.network,
            create_builder_config=lambda: self.settings,
            create_optimization_profile=FakeShapes,
            build_serialized_network=lambda network, settings: self.plan,
        )

    def network(self, flags: int) -> Any:
        self.network_flags = flags
        image = SimpleNamespace(name="image", shape=(-1, 64, 64, 3))
        return SimpleNamespace(get_input=lambda index: image, num_layers=7)

    def OnnxParser(self, network: Any, log: Any) -> Any:
        return SimpleNamespace(parse=lambda graph: True)


@pytest.fixture
def tensorrt(monkeypatch) -> Backend:
    """TensorRT proper on a machine with a card."""
    monkeypatch.setattr(building, "gpus", lambda: (CARD,))
    return Backend("tensorrt", FakeTensorRT(), "11.4.0", SimpleNamespace(errors=["an older build's"]))


def test_every_setting_reaches_tensorrt(tensorrt, tmp_path):
    cache = tmp_path / "cache"
    cache.write_bytes(b"tactics")
    profiles = (Profile(min=1, opt=1, max=1), Profile(min=2, opt=8, max=16))
    config = BuildConfig(
        profiles=profiles, workspace=512, opt_level=4, timing_cache=cache, version_compatible=True,
        hardware_compatibility="ampere+", refit=True,
    )  # fmt: skip
    check_config(config, tensorrt)
    built = build(b"graph", tensorrt, config)
    settings = tensorrt.trt.settings
    assert built.plan == b"plan" and built.layers == 7 and built.notes == ()
    assert tensorrt.trt.network_flags == 2, "strongly typed"
    assert settings.flags == {"VERSION_COMPATIBLE", "REFIT"}, "and TF32 is cleared"
    assert settings.pools == {"WORKSPACE": 512 << 20} and settings.builder_optimization_level == 4
    assert settings.hardware_compatibility_level == "AMPERE_PLUS"
    assert settings.cache.data == b"tactics" and cache.read_bytes() == b"tactics and more"
    assert [shapes.shapes for shapes in settings.profiles] == [
        tuple((batch, 64, 64, 3) for batch in batches) for batches in ((1, 1, 1), (2, 8, 16))
    ]


def test_the_defaults_leave_tensorrt_alone_but_for_tf32(tensorrt):
    build(b"graph", tensorrt, BuildConfig(profiles=ONE))
    settings = tensorrt.trt.settings
    assert settings.flags == set() and settings.pools == {} and settings.cache is None
    assert not hasattr(settings, "builder_optimization_level") and not hasattr(settings, "hardware_compatibility_level")


def test_a_tensorrt_without_tf32_builds(tensorrt):
    tensorrt.trt.BuilderFlag = SimpleNamespace()
    assert build(b"graph", tensorrt, BuildConfig(profiles=ONE)).plan == b"plan"


def test_a_timing_cache_of_another_version_is_refused_and_left_as_it_is(tensorrt, tmp_path):
    cache = tmp_path / "cache"
    cache.write_bytes(b"others")
    tensorrt.trt.settings.cache_fits = False
    with pytest.raises(UsageError, match="is none, or another version's; give a new file"):
        build(b"graph", tensorrt, BuildConfig(profiles=ONE, timing_cache=cache))
    assert cache.read_bytes() == b"others"


def test_a_builder_that_cannot_start_is_one_line(tensorrt):
    def refused(log: Any) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    tensorrt.trt.Builder = refused
    with pytest.raises(UsageError, match=r"tensorrt 11\.4\.0 cannot make its builder \(pybind11.*update the driver"):
        build(b"graph", tensorrt, BuildConfig(profiles=ONE))


def test_a_build_that_fails_does_not_quote_an_older_one(tensorrt):
    tensorrt.trt.plan = None
    with pytest.raises(WorkError, match="cannot build the engine: no reason given"):
        build(b"graph", tensorrt, BuildConfig(profiles=ONE))


@pytest.mark.parametrize("wanted", ["86", "8.6x", "8.", "sm_86", "08.6"])
def test_a_compute_capability_has_one_spelling(wanted):
    with pytest.raises(UsageError, match=rf"--compute-capability {wanted}: .*8\.6"):
        check_config(BuildConfig(profiles=ONE, compute_capabilities=(wanted,)), load_backend("tensorrt-rtx"))


@pytest.mark.parametrize("flag, option", [("--resize", "resize"), ("--dynamic-size", "dynamic_size")])
def test_a_graph_of_any_size_is_refused_with_the_flag_that_made_it(exported, flag, option):
    model = onnx.load(exported.path)
    for axis in (1, 2):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"side {axis}"
    graph = serialise(model, exported.manifest.model_copy(update={"options": {option: True}}))
    with pytest.raises(UsageError, match=rf"images of any size.*export it without {flag}$"):
        build(graph, load_backend("tensorrt-rtx"), BuildConfig(profiles=ONE))
