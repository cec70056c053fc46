"""Small real models with random weights, their bundles, and their exports: made once for all tests of the room."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from export import gpu
from pipeline.backbone import choose_taps, create_classifier, default_normalisation, pyramid
from pipeline.bundle import Bundle, load_bundle, save_bundle
from pipeline.cli import run
from pipeline.model import SaliencyModel, build_model
from pipeline.spec import BackboneSpec, MaskerSpec, ModelSpec

CLASSES = 10


def _make_spec(
    name: str = "resnet18",
    *,
    size: int = 64,
    arguments: dict | None = None,
    layers: tuple[int, ...] | None = None,
    **masker,
) -> ModelSpec:
    """A description such as training writes; ``name`` is torchvision's, or `timm:NAME`."""
    source, _, name = name.rpartition(":")
    source = source or "torchvision"
    classifier = create_classifier(source, name, outputs=CLASSES, arguments=arguments or {})
    mean, std = default_normalisation(source, classifier)
    names = [f"class {k}" for k in range(CLASSES)]
    return ModelSpec(
        backbone=BackboneSpec(
            source=source,
            name=name,
            arguments=arguments or {},
            outputs=CLASSES,
            taps=choose_taps(pyramid(source, classifier, size), layers),
        ),
        masker=MaskerSpec(**masker),
        preset="ca",
        input_size=size,
        mask_size=size // 4,
        mean=mean,
        std=std,
        class_names=names,
        data_classes=names,
        class_index=list(range(CLASSES)),
    )


def _make_model(spec: ModelSpec, seed: int = 0) -> SaliencyModel:
    """Random weights and statistics, the masker's last layer tamed so that masks have values between 0 and 1."""
    torch.manual_seed(seed)
    model = build_model(spec)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        final = model.masker.final if isinstance(model.masker.final, torch.nn.Sequential) else [model.masker.final.conv]
        final[0].weight.mul_(0.15)
    return model.eval()


def pictures(count: int, size: int, seed: int = 0) -> np.ndarray:
    """(count, size, size, 3) uint8: a bright block on a dim, noisy ground."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 120, (count, size, size, 3))
    for image in images:
        x, y = random.integers(0, size // 2, 2)
        image[y : y + size // 2, x : x + size // 2] += random.integers(40, 130, 3)
    return images.astype(np.uint8)


def _make_bundle(folder: Path, name: str = "resnet18", *, samples: int = 24, **options) -> Bundle:
    """A bundle on disk, loaded again."""
    spec = _make_spec(name, **options)
    save_bundle(folder, _make_model(spec), spec, pictures(samples, spec.input_size) if samples else None)
    return load_bundle(folder)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """``make_bundle("timm:NAME", size=64, samples=24, arguments={...}, target_area=True, ...)``."""
    return lambda name="resnet18", **options: _make_bundle(
        tmp_path_factory.mktemp("bundle") / "bundle", name, **options
    )


@pytest.fixture(scope="session")
def bundle(make_bundle) -> Bundle:
    """ResNet-18 at 64 pixels with its masker."""
    return make_bundle()


@pytest.fixture(scope="session")
def exported(bundle: Bundle) -> SimpleNamespace:
    """`export.onnx` of `bundle`: ``path`` and ``manifest``."""
    from export.onnx import export_onnx

    path = bundle.path.parent / "model.onnx"
    return SimpleNamespace(path=path, manifest=export_onnx(bundle, path))


@pytest.fixture(scope="session")
def export_of(make_bundle) -> Callable[..., SimpleNamespace]:
    """``export_of("timm:NAME", config, ...)``: a bundle of `make_bundle` and its `export.onnx`, made once.

    Returns ``bundle``, ``path`` and ``manifest``; `export_onnx` raises unless the gate passes.
    """
    from export.graph import GraphConfig
    from export.onnx import export_onnx

    made: dict[str, SimpleNamespace] = {}

    def export(name: str, config: GraphConfig | None = None, **options) -> SimpleNamespace:
        key = repr((name, config, options))
        if key not in made:
            bundle = make_bundle(name, samples=8, **options)
            path = bundle.path.parent / "model.onnx"
            manifest = export_onnx(bundle, path, config=config)
            made[key] = SimpleNamespace(bundle=bundle, path=path, manifest=manifest)
        return made[key]

    return export


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``complaint(command, *words, status=2)``: what a command says on stderr: one line, no traceback, that status."""

    def run_it(command: ModuleType, *words: object, status: int = 2) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run(command.main, command.__name__, [str(word) for word in words])
        captured = capsys.readouterr()
        assert left.value.code == status, captured
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1, captured.err
        return lines[0]

    return run_it


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it this machine has no NVIDIA driver, whatever it really has: what such a machine must say is tested on all."""

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(gpu, "ctypes", SimpleNamespace(CDLL=missing))
    gpu.gpus.cache_clear()
    assert gpu.gpus() == ()
    yield
    gpu.gpus.cache_clear()


@pytest.fixture
def room_for() -> Callable[[int], AbstractContextManager[None]]:
    """``with room_for(size):`` no file grows beyond that many bytes; the error differs from a full disk's in its number.

    For the command alone, not for the whole test: the limit is the process's, and pytest's own output may be a longer
    file.
    """

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit
