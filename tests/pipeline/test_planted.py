"""The embedded data set: exact boxes and masks, equal bytes for equal seeds, evidence where it was planted."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.annotations import Annotations
from pipeline.data.decode import read_image
from pipeline.data.listing import list_images
from pipeline.data.planted import KINDS, draw, write_planted
from pipeline.data.splits import read_split

SIZE = 96


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("planted")
    write_planted(root, seed=7, size=SIZE, per_class_train=6, per_class_val=4)
    return root


def digests(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_is_an_ordinary_data_folder(planted):
    train, val = read_split(planted, "train"), read_split(planted, "val")
    assert train.classes == val.classes == list(KINDS) == sorted(KINDS) and len(KINDS) == 10
    assert (len(train.paths), len(val.paths)) == (60, 40)
    assert list_images(planted) == (sorted(train.paths + val.paths), 2)
    header, first = (planted / "images.csv").read_text().splitlines()[:2]
    assert header == "path,split,class,w,h,mode,n_boxes,mask_path,mask_value"
    assert first == (
        "train/barred_heart/barred_heart_0000.jpg,train,barred_heart,96,96,RGB,1,"
        "masks/train/barred_heart/barred_heart_0000.png,1"
    )


def overlap(box: np.ndarray, other: tuple[float, ...]) -> float:
    sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    shared = np.prod(np.maximum(sides, 0))
    return shared / (np.prod(box[2:] - box[:2]) + (other[2] - other[0]) * (other[3] - other[1]) - shared)


def test_boxes_bound_masks_and_defeat_the_plain_baselines(planted):
    known = Annotations.of(planted)
    middle = tuple(np.array([33, 33, 190, 190]) * SIZE / 224)
    missed_by_middle, missed_by_whole = [], []
    for path in [*read_split(planted, "train").paths, *read_split(planted, "val").paths]:
        image = read_image(planted / path)
        mask, (box,) = known.mask(path, (SIZE, SIZE)), known.boxes(path, (SIZE, SIZE))
        assert image.shape == (SIZE, SIZE, 3) and mask is not None
        rows, columns = np.nonzero(mask == 1)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert set(np.unique(mask)) == {0, 1} and 0.08 < mask.mean() < 0.25
        assert mask[[0, -1]].sum() == mask[:, [0, -1]].sum() == 0  # nothing is cut off
        missed_by_middle.append(overlap(box, middle) <= 0.5)
        missed_by_whole.append(overlap(box, (0, 0, SIZE, SIZE)) <= 0.5)
    assert np.mean(missed_by_middle) >= 0.8 and np.mean(missed_by_whole) >= 0.95


def test_masks_show_black_and_white(planted):
    picture = Image.open(next((planted / "masks").rglob("*.png")))
    assert picture.mode == "P"
    np.testing.assert_array_equal(np.asarray(picture.convert("L")), np.asarray(picture) * 255)


def test_equal_seeds_give_equal_bytes_whatever_the_counts(planted, tmp_path):
    write_planted(tmp_path / "same", seed=7, size=SIZE, per_class_train=6, per_class_val=4)
    assert digests(tmp_path / "same") == digests(planted)
    write_planted(tmp_path / "fewer", seed=7, size=SIZE, per_class_train=1, per_class_val=2)
    pictures = {path: digest for path, digest in digests(tmp_path / "fewer").items() if not path.endswith(".csv")}
    assert len(pictures) == 60 and pictures.items() < digests(planted).items()
    write_planted(tmp_path / "other", seed=8, size=SIZE, per_class_train=1, per_class_val=2)
    other = digests(tmp_path / "other")
    assert all(other[path] != digest for path, digest in pictures.items())


@pytest.mark.parametrize("size", [32, 64, 224])
def test_other_sizes(size):
    for name in KINDS:
        image, mask = draw(name, size, np.random.default_rng(0))
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        assert mask.shape == (size, size) and 0.07 < mask.mean() < 0.26


def test_classes_differ_in_the_object_alone():
    """What surrounds the objects, and the objects' mean colours, are drawn alike in all classes."""
    behind, inside = [], []
    for name in KINDS:
        pictures = [draw(name, 48, np.random.default_rng([1, i])) for i in range(40)]
        behind.append(np.mean([image[~mask].mean(0) for image, mask in pictures], 0))
        inside.append(np.mean([image[mask].mean(0) for image, mask in pictures], 0))
    assert np.std(behind, 0).max() < 4  # grey levels; one picture's mean varies by about 50
    assert np.std(inside, 0).max() < 12
