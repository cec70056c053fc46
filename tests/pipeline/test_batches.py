"""Which images a step sees depends on seed, step and index alone."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.batches import Augmentation, TrainingBatches, step_indices
from pipeline.data.decode import ImageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for k in range(10):
        Image.fromarray(random.integers(0, 256, (20 + k, 30, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
    return tmp_path


def batches(folder: Path, **changes) -> TrainingBatches:
    options = {
        "root": str(folder),
        "paths": [f"{k}.png" for k in range(10)],
        "labels": list(range(10)),
        "size": 16,
        "geometry": "squash",
        "batch_size": 4,
        "seed": 3,
        "augmentation": Augmentation(),
    }
    return TrainingBatches(**(options | changes))


def test_every_epoch_holds_every_image_once() -> None:
    seen = np.concatenate([step_indices(10, seed=0, step=step, batch_size=4) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:]), "epochs differ in order"


def test_a_later_start_continues_the_same_stream(folder: Path) -> None:
    whole = list(islice(batches(folder).iterate(0), 6))
    tail = list(islice(batches(folder).iterate(4), 2))
    for one, again in zip(whole[4:], tail, strict=True):
        assert one.step == again.step and one.views == again.views
        assert np.array_equal(one.images, again.images) and np.array_equal(one.labels, again.labels)
    assert whole[0].images.shape == (4, 16, 16, 3) and whole[0].images.dtype == np.uint8


def test_workers_share_a_batch_without_overlap(folder: Path) -> None:
    whole = next(batches(folder).iterate(2))
    parts = [next(batches(folder, rank=rank, world=3).iterate(2)) for rank in range(3)]
    for rank, part in enumerate(parts):
        assert np.array_equal(part.images, whole.images[rank::3])
        assert np.array_equal(part.labels, whole.labels[rank::3]) and part.views == whole.views[rank::3]


def test_another_seed_gives_other_views(folder: Path) -> None:
    one = batches(folder).load(0, 5)[0]
    assert np.array_equal(one, batches(folder).load(0, 5)[0])
    assert not np.array_equal(one, batches(folder, seed=4).load(0, 5)[0])
    assert not np.array_equal(one, batches(folder).load(1, 5)[0])


def test_a_damaged_image_ends_the_run_with_its_name(folder: Path) -> None:
    (folder / "4.png").write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"4\.png"):
        list(islice(batches(folder).iterate(0), 3))
