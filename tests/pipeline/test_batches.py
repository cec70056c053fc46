"""Which images a step sees depends on seed, step and index alone."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.batches import Augmentation, TrainingBatches, random_view, step_indices
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


@pytest.mark.parametrize(("width", "height"), [(200, 100), (100, 100), (90, 160), (400, 50)])
def test_the_papers_crops_have_a_shape_of_their_own(width: int, height: int) -> None:
    """As torchvision's RandomResizedCrop: 3:4 to 4:3 whatever the picture's shape, 8 to 100 % of it."""
    rows, columns = np.mgrid[:height, :width]
    picture = np.stack([columns * 255 / (width - 1), rows * 255 / (height - 1), 0 * rows], axis=2).astype(np.uint8)
    random = np.random.default_rng(0)
    absolute = Augmentation(smallest_area=0.08, aspect=4 / 3, absolute=True, mirror=False)
    shapes, areas = [], []
    for _ in range(200):
        view = random_view(picture, 64, absolute, random)[0].astype(float)
        spans = [np.ptp(view[..., 0]) / 255 * width * 64 / 63, np.ptp(view[..., 1]) / 255 * height * 64 / 63]
        shapes.append(spans[0] / spans[1])
        areas.append(spans[0] * spans[1] / (width * height))
    assert 0.72 < min(shapes) < max(shapes) < 1.4
    assert min(areas) > 0.06
    if width / height < 4:  # of which no crop of 4:3 is larger than a sixth
        assert max(areas) > 0.6 * min(1.0, 4 / 3 * height / width, 4 / 3 * width / height)
    relative = [
        random_view(picture, 64, Augmentation(smallest_area=0.08, mirror=False), random)[0].astype(float)
        for _ in range(50)
    ]
    spans = [(np.ptp(view[..., 0]) * width, np.ptp(view[..., 1]) * height) for view in relative]
    assert width == height or any(not 0.72 < w / h < 1.4 for w, h in spans), "of the picture's shape otherwise"
