"""Which files count, in which order, and the labelled splits of a data root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.data.listing import IMAGE_SUFFIXES, list_images
from pipeline.data.splits import read_split
from pipeline.errors import UsageError


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_suffixes_are_those_of_the_contract():
    assert {s[1:] for s in IMAGE_SUFFIXES} == {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff"}


def test_what_counts(tmp_path):
    good = [
        f"pictures/{i}.{s}"
        for i, s in enumerate(
            ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "JPG", "Png", "TiFF"]
        )
    ]
    good += ["with space and ünïcødé 图.jpg", ".hidden.png", ".folder/a.gif", "two.dots.txt.jpg"]
    other = ["notes.txt", "jpg", "a.jpg.part", "b.svg", "c.jp2", "deep/er/readme"]
    touch(tmp_path, *good, *other)
    (tmp_path / "folder.jpg").mkdir()
    listing = list_images(tmp_path)
    assert listing.paths == sorted(good, key=os.fsencode)
    assert listing.skipped == len(other)


def test_order_is_that_of_bytes(tmp_path):
    touch(tmp_path, "b.jpg", "a/z.jpg", "a.jpg", "a b.jpg", "Z.jpg", "é.jpg", "a/é.jpg")
    assert list_images(tmp_path).paths == ["Z.jpg", "a b.jpg", "a.jpg", "a/z.jpg", "a/é.jpg", "b.jpg", "é.jpg"]


def test_names_that_are_not_utf_8(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    touch(tmp_path, name)
    assert list_images(tmp_path).paths == [name]


def test_masks_of_a_data_set_are_left_out(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/masks/2.jpg", "masks/train/a/1.png", "masks/notes.txt", "boxes.csv")
    assert list_images(tmp_path) == (["train/a/1.jpg", "train/masks/2.jpg"], 1)
    assert list_images(tmp_path / "masks").paths == ["train/a/1.png"]


def test_a_folder_called_masks_counts_elsewhere(tmp_path):
    touch(tmp_path, "masks/1.png", "2.png")
    assert list_images(tmp_path) == (["2.png", "masks/1.png"], 0)


def test_links(tmp_path):
    touch(tmp_path, "real/1.jpg")
    (tmp_path / "real/up").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "file.jpg").symlink_to(tmp_path / "real/1.jpg")
    (tmp_path / "lost.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    (tmp_path / "lost.txt").symlink_to(tmp_path / "nowhere")
    assert list_images(tmp_path) == (["file.jpg", "linked/1.jpg", "lost.jpg", "real/1.jpg", "self.jpg"], 1)


def test_a_pipe_is_never_a_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "pipe.jpg")
    assert list_images(tmp_path) == ([], 2)


def test_missing_folder(tmp_path):
    touch(tmp_path, "file.jpg")
    for root in (tmp_path / "nowhere", tmp_path / "file.jpg"):
        with pytest.raises(UsageError, match=str(root)):
            list_images(root)


def data_set(root: Path) -> Path:
    touch(root, *(f"train/{c}/{i}.jpg" for c in ("cat", "ant", "Bee") for i in range(20)), "train/cat/more/x.png")
    touch(root, "val/cat/v.jpg", "val/Bee/w.JPG", "val/Bee/notes.txt", "val/.cache/y.jpg", "val/stray.jpg")
    return root


def test_split(tmp_path):
    train = read_split(data_set(tmp_path), "train")
    assert train.root == str(tmp_path) and train.classes == ["Bee", "ant", "cat"]
    assert len(train.paths) == len(train.labels) == 61 and train.labels == sorted(train.labels)
    assert train.paths[0] == "train/Bee/0.jpg" and train.paths[-1] == "train/cat/more/x.png"
    val = read_split(tmp_path, "val", classes=train.classes)
    assert (val.paths, val.labels, val.classes) == (["val/Bee/w.JPG", "val/cat/v.jpg"], [0, 2], train.classes)
    assert read_split(tmp_path, "val").classes == ["Bee", "cat"]


def test_per_class_is_nested_and_independent_of_other_classes(tmp_path):
    data_set(tmp_path)
    one, five, nine = (read_split(tmp_path, "train", per_class=n, seed=3) for n in (1, 5, 9))
    assert [len(s.paths) for s in (one, five, nine)] == [3, 15, 27]
    assert set(one.paths) < set(five.paths) < set(nine.paths)
    assert five.labels == [0] * 5 + [1] * 5 + [2] * 5 and five == read_split(tmp_path, "train", per_class=5, seed=3)
    assert five.paths != read_split(tmp_path, "train", per_class=5, seed=4).paths
    assert read_split(tmp_path, "train", per_class=100).paths == read_split(tmp_path, "train").paths
    touch(tmp_path, "train/aardvark/1.jpg")
    assert set(five.paths) < set(read_split(tmp_path, "train", per_class=5, seed=3).paths)


def test_wrong_use_says_what_where_and_what_next(tmp_path):
    def message(*args, **kwargs) -> str:
        with pytest.raises(UsageError) as caught:
            read_split(*args, **kwargs)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no folder train/" in message(tmp_path, "train") and "<class>/<image>" in message(tmp_path, "train")
    touch(tmp_path, "train/1.jpg")
    assert "no images in" in message(tmp_path, "train")
    touch(tmp_path, "train/cat/1.jpg", "train/dog/notes.txt")
    assert "train/dog" in message(tmp_path, "train")
    touch(tmp_path, "val/cat/1.jpg", "val/cow/1.jpg")
    assert "val/cow" in message(tmp_path, "val", classes=["cat", "dog"])
    (tmp_path / "test" / "cat").mkdir(parents=True)
    assert "no images in" in message(tmp_path, "test", classes=["cat"])
