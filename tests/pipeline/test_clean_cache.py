"""The clean pass of a frozen classifier is computed once for each view, and changes nothing but the time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import clean_cache
from pipeline.clean_cache import CleanCache
from pipeline.data.batches import Augmentation, TrainingBatches
from pipeline.presets import PRESETS
from tests.pipeline.test_step import a_batch, a_model, a_step


def test_the_second_round_asks_the_classifier_for_masked_pictures_only() -> None:
    model = a_model()
    forwards: list[int] = []
    model.backbone.register_forward_hook(lambda *_: forwards.append(1))
    cached = a_step(model, PRESETS["fix"], cache=CleanCache(6))
    batch = a_batch()._replace(views=(0, 3, 4, 7, 8, 11))
    first = cached.losses(batch, divisor=6, phase="joint", drawn=None)
    before = len(forwards)
    again = cached.losses(batch, divisor=6, phase="joint", drawn=None)
    assert before == 4 and len(forwards) - before == 3  # clean, blank, masked-in, masked-out
    assert again.masker is not None and first.masker is not None
    assert torch.equal(again.masker, first.masker)
    part = batch._replace(views=(0, 3, 4, 7, 8, 10))  # one that is not known: all are computed
    cached.losses(part, divisor=6, phase="joint", drawn=None)
    assert len(forwards) - before == 7


def test_a_classifier_that_learns_is_always_asked() -> None:
    model = a_model()
    cache = CleanCache(6)
    step = a_step(model, PRESETS["ca"], cache=cache)
    batch = a_batch()._replace(views=tuple(range(6)))
    step.losses(batch, divisor=6, phase="joint", drawn=None)
    assert cache.find(range(6)) is None


def test_what_is_too_large_is_not_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(clean_cache, "MOST_BYTES", 1000)
    logits, features = torch.zeros(2, 10), {3: torch.zeros(2, 4, 4, 4)}  # 296 bytes a view
    small, large = CleanCache(3), CleanCache(4)
    for cache in (small, large):
        cache.keep((0, 1), logits, features)
    assert small.find((1, 0)) is not None and small.find((0, 2)) is None
    assert large.find((0, 1)) is None
    assert capsys.readouterr().out.startswith("the classifier's answers to 4 views take 0.0 GiB")


def test_views_tell_pictures_apart(tmp_path: Path) -> None:
    """Equal numbers, equal pictures: in whole views, which are two for each picture, one the mirror of the other."""
    random = np.random.default_rng(0)
    for k in range(3):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
    whole = Augmentation(smallest_area=1.0, aspect=1.0)
    assert (whole.views, Augmentation().views) == (2, None)
    stream = TrainingBatches(
        root=str(tmp_path),
        paths=[f"{k}.png" for k in range(3)],
        labels=[0, 1, 2],
        size=16,
        geometry="squash",
        batch_size=3,
        seed=0,
        augmentation=whole,
    ).iterate(0)
    seen: dict[int, np.ndarray] = {}
    for _ in range(12):
        batch = next(stream)
        for view, image in zip(batch.views, batch.images, strict=True):
            assert np.array_equal(seen.setdefault(view, image), image)
    stream.close()
    assert set(seen) == set(range(6))
    assert all(np.array_equal(seen[2 * k][:, ::-1], seen[2 * k + 1]) for k in range(3))
