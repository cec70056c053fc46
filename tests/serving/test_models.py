"""Named models: loaded when they are asked for, closed when nobody holds them any more; and batches of a size that was tried."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest

from serving import models
from serving.config import ServiceConfig
from serving.metrics import Metrics


class Held:
    """A model that is only there or closed."""

    alive: ClassVar[Counter[str]] = Counter()
    gate = threading.Event()

    def __init__(self, engine: str, **_: Any) -> None:
        self.name = Path(engine).name
        if self.name == "slow":
            assert Held.gate.wait(20)
        if self.name == "broken":
            raise RuntimeError("no such engine")
        info = SimpleNamespace(sha256="", kind="", provider="", manifest={})
        self.predictor = SimpleNamespace(info=info, trouble=None, close=self._close)
        self.closed = False
        Held.alive[self.name] += 1

    def _close(self) -> None:
        self.closed = True
        Held.alive[self.name] -= 1

    async def configure(self, _config: object) -> None:
        assert not self.closed


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "Model", Held)
    Held.alive.clear()
    Held.gate.clear()


def opened(*names: str, most: int = 2) -> Any:
    config = ServiceConfig(engine="/e/default", models=",".join(f"{name}=/e/{name}" for name in names), max_models=most)
    return models.Models(config, Metrics(replica="r"))


@pytest.mark.parametrize("most", [1, 2])
def test_a_model_in_use_is_not_closed(held: None, most: int) -> None:
    async def crowd() -> None:
        mine = opened("a", "b", "c", most=most)

        async def one(number: int) -> None:
            name = "abc"[number % 3]
            async with mine.use(name) as model:
                for _ in range(3):
                    assert model.name == name and not model.closed
                    assert sum(Held.alive.values()) <= most + 1  # and the default
                    await asyncio.sleep(0.002)
                assert not model.closed

        async with asyncio.timeout(20):
            await asyncio.gather(*map(one, range(30)))
            async with mine.use("b"):  # the next load closes what nobody holds
                pass
        assert 2 <= sum(Held.alive.values()) <= most + 1

    asyncio.run(crowd())


def test_a_load_holds_up_only_those_who_wait_for_it(held: None) -> None:
    async def crowd() -> None:
        mine = opened("a", "slow")
        async with mine.use("a"):
            pass
        impatient = asyncio.create_task(_use(mine, "slow"))
        patient = asyncio.create_task(_use(mine, "slow"))
        await asyncio.sleep(0.05)
        async with asyncio.timeout(5), mine.use("a") as model:
            assert model.name == "a"
        impatient.cancel()
        Held.gate.set()
        assert (await patient).name == "slow"
        assert Held.alive["slow"] == 1

    asyncio.run(crowd())


def test_a_load_that_fails_is_tried_again(held: None) -> None:
    async def twice() -> None:
        mine = opened("broken", "a")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no such engine"):
                await _use(mine, "broken")
        assert (await _use(mine, "a")).name == "a"
        assert "third" not in mine

    asyncio.run(twice())


async def _use(mine: Any, name: str) -> Any:
    async with mine.use(name) as model:
        return model


def test_a_new_batch_size_is_tried_before_it_is_used(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServiceConfig(engine=str(bundle), batch_size=2)
    sizes: list[int] = []
    run = models.Predictor._run

    def watched(self: models.Predictor, pixels: Any) -> Any:
        sizes.append(len(pixels))
        return run(self, pixels)

    monkeypatch.setattr(models.Predictor, "_run", watched)

    async def live() -> None:
        model = models.Model(str(bundle), config=config, metrics=Metrics(replica="r"))
        assert sizes == [1, 2]
        await model.configure(config.model_copy(update={"batch_size": 4}))
        assert sizes == [1, 2, 4]
        assert model._together.batch_size == 4
        await model.configure(config.model_copy(update={"batch_size": 4, "batch_wait_ms": 20.0}))
        assert sizes == [1, 2, 4]
        assert model._together.wait_s == pytest.approx(0.02)

    asyncio.run(live())


@pytest.mark.parametrize("carried", ["bundle", "manifest", "reference"])
def test_drift_is_measured_from_the_training_images(bundle: Path, tmp_path: Path, carried: str) -> None:
    from export.graph import GraphConfig
    from export.manifest import describe
    from pipeline.bundle import read_spec
    from pipeline.mask_statistics import mask_statistics, summarise

    statistics = summarise(mask_statistics(np.random.default_rng(0).random((9, 16, 16))))
    spec = read_spec(bundle).model_copy(update={"mask_statistics": statistics})
    known = tmp_path / "bundle"
    shutil.copytree(bundle, known)
    (known / "model.json").write_text(spec.model_dump_json())
    engine = {"bundle": str(known)}.get(carried, "/e/model.onnx")
    config = ServiceConfig(engine=engine, reference=str(known) if carried == "reference" else None)
    written = describe(spec, config=GraphConfig(), bundle_sha256="", opset=20, rebuild="", versions={})
    manifest = written.model_dump() if carried == "manifest" else {}
    metrics = Metrics(replica="r")
    metrics.set_reference(models._reference(config, manifest))
    (family,) = [samples for name, _, _, samples in metrics.snapshot() if name == "onepass_mask_reference"]
    found = {(labels["statistic"], labels["figure"]): value for _, labels, value in family}
    assert found == {(name, key): statistics[name][key] for name in statistics for key in ("mean", "std")}
    assert set(statistics) == {"area", "entropy", "off_centre"}


def test_masks_of_other_models_are_no_drift_of_the_default_one(bundle: Path) -> None:
    """The reference is of the training of one engine; another one's masks are other masks."""
    config = ServiceConfig(engine=str(bundle), models="other=/e/other.onnx")
    _, encoded = cv2.imencode(".png", np.full((40, 60, 3), 127, np.uint8))

    async def score(model: models.Model) -> None:
        picture = await model.predictor.decode(encoded.tobytes(), keep=False)
        logits, mask = await model.infer(picture)
        await model.predictor.finish(picture, logits, mask, uri="", top_k=1)

    same_file = bundle.parent / ".." / bundle.parent.name / bundle.name
    for engine, watched in ((str(bundle), 1), (str(same_file), 0)):
        metrics = Metrics(replica="r")
        model = models.Model(engine, config=config, metrics=metrics)
        asyncio.run(score(model))
        model.predictor.close()
        samples = [sample for _, _, _, found in metrics.snapshot() for sample in found]
        assert [value for name, _, value in samples if name == "onepass_mask_area_count"] == [watched]
