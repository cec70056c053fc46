"""A real, tiny engine (ResNet-18 at 64 pixels, random weights) and small sets of images, once for all tests."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pyarrow as pa
import pytest

from tests.serving.reading import read_scores
from tests.serving.running import TOKEN, start, stop

SIZE = 64
# Workers of Ray are niced by default and would starve beside whatever else runs on a test machine.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def make_bundle(path: Path, *, seed: int, classes: int = 10, class_conditional: bool = False) -> Path:
    """An untrained model, saved by the product's own code."""
    import torch

    from pipeline.backbone import IMAGENET_MEAN, IMAGENET_STD, choose_taps, create_classifier, pyramid
    from pipeline.bundle import save_bundle
    from pipeline.model import build_model
    from pipeline.spec import BackboneSpec, MaskerSpec, ModelSpec

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    classifier = create_classifier("torchvision", "resnet18", outputs=classes, arguments={})
    taps = choose_taps(pyramid("torchvision", classifier, SIZE), None)
    names = [f"class {k}" for k in range(classes)]
    spec = ModelSpec(
        backbone=BackboneSpec(source="torchvision", name="resnet18", outputs=classes, taps=taps),
        masker=MaskerSpec(class_conditional=class_conditional),
        preset="ca",
        input_size=SIZE,
        mask_size=SIZE // 4,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        class_names=names,
        data_classes=names,
        class_index=list(range(classes)),
    )
    model = build_model(spec).eval()
    images = torch.from_numpy(np.stack([draw(k, SIZE, SIZE) for k in range(8)])).permute(0, 3, 1, 2) / 255.0
    with torch.no_grad():  # an untrained masker is nearly flat; the logits of this one have mean 0 and deviation 2
        logits = torch.logit(model((images - 0.45) / 0.225)[1].double(), eps=1e-9)
        final = model.masker.final[0]
        gain = 2.0 / float(logits.std())
        final.bias.copy_(gain * (final.bias - float(logits.mean())))
        final.weight.mul_(gain)
    save_bundle(path, model, spec)
    return path


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("engine") / "bundle", seed=0)


@pytest.fixture(scope="session")
def onnx_engine(bundle: Path) -> Path:
    from export.onnx import export_onnx
    from pipeline.bundle import load_bundle

    path = bundle.parent / "model.onnx"
    export_onnx(load_bundle(bundle), path)
    return path


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("engine") / "other", seed=1)


def draw(seed: int, width: int = 80, height: int = 60) -> np.ndarray:
    """A picture (height, width, 3) uint8 with a bright ellipse on noise, different for every seed."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 90, (height, width, 3), dtype=np.uint8)
    centre = (int(random.integers(width // 4, 3 * width // 4)), int(random.integers(height // 4, 3 * height // 4)))
    colour = [int(value) for value in random.integers(120, 255, 3)]
    cv2.ellipse(image, centre, (width // 6, height // 5), 0, 0, 360, colour, -1)
    return image


def write_images(folder: Path, count: int, *, first: int = 0) -> Path:
    """``count`` small JPEGs under ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(first, first + count):
        (folder / f"{k:05d}.jpg").write_bytes(cv2.imencode(".jpg", draw(k))[1].tobytes())
    return folder


@pytest.fixture(scope="session")
def jpeg() -> Callable[..., bytes]:
    """Encoded pictures by seed, and by size where it is given."""
    return lambda seed, **size: cv2.imencode(".jpg", draw(seed, **size))[1].tobytes()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 150)


@pytest.fixture(scope="session")
def score_here(bundle: Path) -> Callable[..., pa.Table]:
    """Run a job in this process, without Ray: ``score_here(engine, source, output, **request) -> table``.

    ``expected``: how many shards have to be left.
    """
    from serving.job import BatchRequest, Prepared, prepare, run_job
    from serving.plan import read_shard
    from serving.progress import Progress
    from serving.scorer import ShardScorer

    def in_process(prepared: Prepared, _progress: Progress) -> Iterator[dict[str, Any]]:
        scorer = ShardScorer(prepared.scorer_config(threads=1))
        for planned in prepared.pending:
            shard = read_shard(prepared.plan.folder, planned.file, planned.group)
            yield vars(scorer.score(shard, retry_errors=prepared.request.retry_errors))

    def score(
        engine: Path, source: Path | str, output: Path | str, *, expected: int | None = None, **request: Any
    ) -> pa.Table:
        asked = {"engine": str(engine), "input": str(source), "output": str(output), "batch_size": 8} | request
        prepared = prepare(BatchRequest(**asked))
        assert expected is None or len(prepared.pending) == expected
        assert run_job(prepared, score=in_process).state == "done"
        return read_scores(output)

    return score


@pytest.fixture(scope="session")
def roots(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that jobs may use, with images in `in` and a link that leads away."""
    folder = tmp_path_factory.mktemp("roots")
    shutil.copytree(images, folder / "in")
    (folder / "away").symlink_to("/etc")
    return folder


@pytest.fixture(scope="session")
def service(
    bundle: Path, other_bundle: Path, roots: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("service")
    os.environ["ONEPASS_ROOTS"] = str(roots)
    (folder / "tokens").write_text(f"{TOKEN}\nanother\n")
    process, address, log = start(
        folder, engine=str(bundle), token_file=str(folder / "tokens"), max_images=4, max_queue=8, max_body_bytes=2_000_000,
        batch_size=2, live={"batch_size": 4}, models=f"second={other_bundle}",
    )  # fmt: skip
    client = httpx.Client(base_url=address, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
    deadline = time.time() + 150
    while True:
        try:
            if client.get("/healthz").status_code == 200:
                break
        except httpx.TransportError:
            pass
        if process.poll() is not None or time.time() > deadline:
            stop(process)
            pytest.fail(f"the service did not start: {log.read_text()[-3000:]}")
        time.sleep(0.2)
    yield client
    client.close()
    stop(process)
