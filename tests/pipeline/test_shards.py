"""Pictures in tar and Parquet shards, here and in a store, are the pictures of the folder they were made from."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import store
from pipeline.data.batches import WINDOW, Loaded, TrainingBatches, block_numbers, epoch_order
from pipeline.data.decode import ImageError
from pipeline.data.images import Images
from pipeline.data.planted import write_planted
from pipeline.data.splits import Split, read_split
from pipeline.errors import UsageError
from tests.s3_server import s3_server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planted")
    write_planted(root, seed=0, size=32, per_class_train=4, per_class_val=1)
    return root


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_tars(split: Split, out: Path, label: str) -> None:
    """Three shards ``train-<k>.tar``; classes as ``cls`` members, in ``json`` members, or by the ``folder`` in the archive."""
    out.mkdir(parents=True, exist_ok=True)
    for k in range(3):
        with tarfile.open(out / f"train-{k}.tar", "w") as archive:
            for index in range(k, len(split.paths), 3):
                name = split.classes[split.labels[index]]
                key = f"{name}/{index:04d}" if label == "folder" else f"{index:04d}"
                add(archive, f"{key}.png", (Path(split.root) / split.paths[index]).read_bytes())
                if label == "cls":
                    add(archive, f"{key}.cls", name.encode())
                elif label == "json":
                    add(archive, f"{key}.json", json.dumps({"label": name, "other": 1}).encode())


def write_parquets(split: Split, out: Path, kind: str) -> None:
    """Two files in ``train/`` with row groups of five: ``struct`` as Hugging Face writes them, ``bytes``, or ``uri``."""
    (out / "train").mkdir(parents=True, exist_ok=True)
    for k in range(2):
        rows = range(k, len(split.paths), 2)
        places = [Path(split.root) / split.paths[index] for index in rows]
        data = [place.read_bytes() for place in places]
        names = [split.classes[split.labels[index]] for index in rows]
        if kind == "uri":
            table = pa.table({"uri": [str(place) for place in places], "class": names})
        elif kind == "bytes":
            table = pa.table({"image": data, "class_name": names})
        else:
            about = {"info": {"features": {"label": {"names": split.classes, "_type": "ClassLabel"}}}}
            table = pa.table(
                {"image": [{"bytes": d, "path": None} for d in data], "label": [split.labels[index] for index in rows]}
            ).replace_schema_metadata({"huggingface": json.dumps(about)})
        pq.write_table(table, out / "train" / f"{k}.parquet", row_group_size=5)


def contents(root: Path | str, split: Split) -> set[tuple[str, bytes]]:
    images = Images(str(root))
    return {(split.classes[label], images.read(path)) for path, label in zip(split.paths, split.labels, strict=True)}


WRITERS = {
    "cls": write_tars,
    "json": write_tars,
    "folder": write_tars,
    "struct": write_parquets,
    "bytes": write_parquets,
    "uri": write_parquets,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_shards_hold_what_the_folder_holds(folder: Path, tmp_path: Path, kind: str) -> None:
    split = read_split(folder, "train")
    WRITERS[kind](split, tmp_path / "shards", kind)
    found = read_split(tmp_path / "shards", "train")
    assert found.classes == split.classes
    assert np.bincount(found.labels).tolist() == np.bincount(split.labels).tolist()
    assert contents(tmp_path / "shards", found) == contents(folder, split)
    few = read_split(tmp_path / "shards", "train", per_class=2, seed=1)
    assert np.bincount(few.labels).tolist() == [2] * len(split.classes)
    assert few == read_split(tmp_path / "shards", "train", per_class=2, seed=1)


def test_numbered_classes_are_in_the_order_of_their_numbers(folder: Path, tmp_path: Path) -> None:
    split = read_split(folder, "train")
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for number in (10, 9, 0):
            add(archive, f"{number}x.png", (folder / split.paths[number]).read_bytes())
            add(archive, f"{number}x.cls", str(number).encode())
    found = read_split(tmp_path, "train")
    assert found.classes == ["0", "9", "10"] and found.labels == [0, 1, 2]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server():
        files, _ = store.filesystem("s3://training")
        files.mkdir("training")
        yield "s3://training"


def upload(root: Path, place: str) -> None:
    for file in root.rglob("*"):
        if file.is_file():
            store.write_bytes(f"{place}/{file.relative_to(root)}", file.read_bytes())


@pytest.mark.parametrize("kind", ["image folder", "cls", "struct"])
def test_from_an_object_store(folder: Path, tmp_path: Path, bucket: str, kind: str) -> None:
    split = read_split(folder, "train")
    root = folder
    if kind in WRITERS:
        root = tmp_path / "shards"
        WRITERS[kind](split, root, kind)
    place = f"{bucket}/{kind}"
    upload(root, place)
    found = read_split(place, "train")
    assert found.classes == split.classes and found.root == place
    assert contents(place, found) == contents(folder, split)


def test_uris_of_an_object_store_in_a_column(folder: Path, tmp_path: Path, bucket: str) -> None:
    """The table lies here or there; the pictures are where its rows say."""
    split = read_split(folder, "train")
    upload(folder, f"{bucket}/pictures")
    table = pa.table(
        {
            "uri": [f"{bucket}/pictures/{path}" for path in split.paths],
            "label": [split.classes[label] for label in split.labels],
        }
    )
    (tmp_path / "train").mkdir()
    pq.write_table(table, tmp_path / "train" / "0.parquet")
    upload(tmp_path, f"{bucket}/table")
    for root in (str(tmp_path), f"{bucket}/table"):
        found = read_split(root, "train")
        assert found.classes == split.classes
        assert contents(root, found) == contents(folder, split)


def test_row_groups_are_shuffled_a_few_at_a_time() -> None:
    """Every image once, another order each epoch, and never more row groups between two of one than are kept in memory."""
    blocks = np.repeat(np.arange(60), 7)
    first, second = (epoch_order(len(blocks), seed=3, epoch=epoch, blocks=blocks) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(len(blocks)))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, epoch_order(len(blocks), seed=3, epoch=0, blocks=blocks))
    for start in range(0, len(blocks), 7 * WINDOW):
        assert len(set(blocks[first[start : start + 7 * WINDOW]])) <= WINDOW
    assert block_numbers(["train/a.jpg", "train/0.tar#1+2"]) is None
    assert block_numbers(["0.parquet#0:0", "0.parquet#0:1", "0.parquet#1:0", "1.parquet#0:0"]) is not None


@pytest.mark.parametrize("kind", ["cls", "struct"])
def test_batches_are_shared_among_workers_and_resume(folder: Path, tmp_path: Path, kind: str) -> None:
    split = read_split(folder, "train")
    WRITERS[kind](split, tmp_path / "shards", kind)
    found = read_split(tmp_path / "shards", "train")

    def batches(first: int, rank: int = 0, world: int = 1) -> list[Loaded]:
        stream = TrainingBatches(
            root=found.root,
            paths=found.paths,
            labels=found.labels,
            size=16,
            geometry="squash",
            batch_size=6,
            seed=1,
            augmentation=None,
            rank=rank,
            world=world,
        ).iterate(first)
        taken = [next(stream) for _ in range(8 - first)]
        stream.close()
        return taken

    whole, later = batches(0), batches(5)
    for one, same in zip(whole[5:], later, strict=True):
        assert one.step == same.step and one.views == same.views
        assert np.array_equal(one.images, same.images) and np.array_equal(one.labels, same.labels)
    for rank in range(2):
        for one, mine in zip(whole, batches(0, rank, 2), strict=True):
            assert np.array_equal(mine.images, one.images[rank::2])
            assert np.array_equal(mine.labels, one.labels[rank::2])


def test_damage_is_named(folder: Path, tmp_path: Path) -> None:
    split = read_split(folder, "train")
    write_tars(split, tmp_path / "tar", "cls")
    found = read_split(tmp_path / "tar", "train")
    shard = tmp_path / "tar" / "train-1.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    images = Images(str(tmp_path / "tar"))
    lost = [path for path in found.paths if path.startswith("train-1.tar")][-1]
    with pytest.raises(ImageError, match="unreadable: it ends before byte"):
        images.read(lost)
    with pytest.raises(UsageError, match=r"train-1\.tar cannot be read .* mend or remove it"):
        read_split(tmp_path / "tar", "train")
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        add(archive, "1.png", b"x")
    with pytest.raises(UsageError, match=r"the picture 1 has no class; add a member 1\.cls"):
        read_split(tmp_path, "train")
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "p" / "train.parquet")
    with pytest.raises(UsageError, match=r"train\.parquet has no column of classes"):
        read_split(tmp_path / "p", "train")
    pq.write_table(pa.table({"label": [1], "x": [1.0]}), tmp_path / "p" / "train.parquet")
    with pytest.raises(UsageError, match=r"has no column of pictures or URIs among label, x"):
        read_split(tmp_path / "p", "train")


def test_an_archive_beside_the_pictures_is_no_shard(folder: Path, tmp_path: Path) -> None:
    split = read_split(folder, "train")
    root = tmp_path / "root"
    shutil.copytree(folder, root)
    with tarfile.open(root / "train.tar", "w") as archive:
        add(archive, "other/1.png", b"x")
    assert read_split(root, "train").paths == split.paths


def test_names_with_dots(folder: Path, tmp_path: Path) -> None:
    """Companions of a picture are no pictures, and pictures whose names have dots are not each other's companions."""
    data = (folder / read_split(folder, "train").paths[0]).read_bytes()
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name in ("cat/2021.06.01.png", "cat/2021.07.02.png", "dog/1.png", "dog/1.mask.png"):
            add(archive, name, data)
    found = read_split(tmp_path, "train")
    assert (found.classes, found.labels) == (["cat", "dog"], [0, 0, 1])


def test_a_bucket_that_is_not_there(bucket: str) -> None:
    with pytest.raises(UsageError, match="s3://nowhere/set/train cannot be listed"):
        read_split("s3://nowhere/set", "train")
