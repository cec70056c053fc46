"""What counts as an input, of every shape that ``--input`` may have."""

from __future__ import annotations

import errno
import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import store
from pipeline.data.decode import ImageError
from pipeline.data.listing import list_images
from pipeline.data.store import StoreError
from pipeline.errors import UsageError
from serving.inputs import open_inputs
from serving.plan import cut
from serving.sources import printable, sources
from tests.s3_server import s3_server

AWKWARD = [
    "a b.jpg",
    "ünï🦊.PNG",
    "[x].jpeg",
    "100%25.jpg",
    "q?uery.jpg",
    "ha#sh.webp",
    "sub/deep/z.TIFF",
    ".hidden.jpg",
]


def places(inputs) -> list[str]:
    return [entry.place for _, entry in inputs.entries()]


@pytest.fixture
def awkward(tmp_path: Path) -> Path:
    root = tmp_path / "in put"
    for name in AWKWARD:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "notes.md").write_text("no image")
    (root / "labels.parquet").write_text("not even Parquet")
    return root


def test_folder_lists_images_and_counts_the_rest(awkward: Path) -> None:
    os.mkfifo(awkward / "pipe.jpg")
    (awkward / "lost.jpg").symlink_to(awkward / "nowhere")
    (awkward / "loop").symlink_to(awkward)
    inputs = open_inputs(str(awkward))
    assert sorted(places(inputs)) == sorted(str(awkward / name) for name in [*AWKWARD, "lost.jpg"])
    assert inputs.others == {".md": 1, ".parquet": 1, ".jpg": 1}
    listing = list_images(awkward)
    assert sorted(places(inputs)) == [f"{awkward}/{path}" for path in sorted(listing.paths)]
    assert listing.skipped == sum(inputs.others.values())


def test_masks_of_a_data_set_root_are_no_inputs(tmp_path: Path) -> None:
    for name in ("train/a/1.jpg", "val/a/2.jpg", "masks/val/a/2.png", "train/masks/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert places(open_inputs(str(tmp_path))) == [
        str(tmp_path / n) for n in ("train/a/1.jpg", "train/masks/3.png", "val/a/2.jpg")
    ]


def test_glob_file_and_the_output_inside_the_input(awkward: Path) -> None:
    assert places(open_inputs(f"{awkward}/*.jpg")) == [
        str(awkward / n) for n in sorted(AWKWARD) if "/" not in n and n.endswith(".jpg")
    ]
    assert places(open_inputs(f"{awkward}/**/*.TIFF")) == [str(awkward / "sub/deep/z.TIFF")]
    assert places(open_inputs(f"{awkward}/[[]x].jpeg")) == [str(awkward / "[x].jpeg")]
    assert places(open_inputs(str(awkward / "[x].jpeg"))) == [str(awkward / "[x].jpeg")]
    assert str(awkward / "sub/deep/z.TIFF") not in places(open_inputs(str(awkward), exclude=str(awkward / "sub")))


def test_lists_keep_their_order_and_their_doubles(awkward: Path) -> None:
    text = awkward / "list.txt"
    text.write_text("ünï🦊.PNG\n\na b.jpg\r\na b.jpg\n/no/such.jpg\ns3://bucket/k.jpg\n", encoding="utf-8")
    expected = [
        str(awkward / "ünï🦊.PNG"),
        str(awkward / "a b.jpg"),
        str(awkward / "a b.jpg"),
        "/no/such.jpg",
        "s3://bucket/k.jpg",
    ]
    with s3_server():
        files, _ = store.filesystem("s3://bucket")
        files.mkdir("bucket")
        assert places(open_inputs(str(text))) == expected
        shards = list(cut(open_inputs(str(text)).entries(), version="v", shard_size=2))
    table = awkward / "list.csv"
    table.write_text('label,path\n1,"a b.jpg"\n2,[x].jpeg\n')
    assert places(open_inputs(str(table))) == [str(awkward / "a b.jpg"), str(awkward / "[x].jpeg")]
    assert len({shard.key for shard in shards}) == len(shards)
    assert [uri for shard in shards for uri in shard.uris] == expected


def test_parquet_of_bytes_structs_and_uris(tmp_path: Path) -> None:
    (tmp_path / "one.jpg").write_bytes(b"one")
    pq.write_table(pa.table({"path": ["p", "q"], "image": [b"1", None]}), tmp_path / "bytes.parquet")
    structs = pa.array([{"bytes": b"s", "path": "x"}, {"bytes": None, "path": None}])
    pq.write_table(pa.table({"image": structs, "label": [1, 2]}), tmp_path / "structs.parquet")
    pq.write_table(pa.table({"uri": ["one.jpg", "/no.jpg", None]}), tmp_path / "uris.parquet")

    def read(name: str) -> list[tuple[str, bytes | str]]:
        found: list[tuple[str, bytes | str]] = []
        for shard in cut(open_inputs(str(tmp_path / name)).entries(), version="v", shard_size=10):
            assert shard.rows == sum(1 for _ in sources(shard))
            for source in sources(shard):
                try:
                    found.append((source.uri, source.read()))
                except ImageError as error:
                    found.append((source.uri, error.kind))
        return found

    assert read("bytes.parquet") == [("p", b"1"), ("q", "unreadable")]
    place = f"{tmp_path}/structs.parquet"
    assert read("structs.parquet") == [(f"{place}#0", b"s"), (f"{place}#1", "unreadable")]
    place = f"{tmp_path}/uris.parquet"
    assert read("uris.parquet") == [
        (f"{tmp_path}/one.jpg", b"one"),
        ("/no.jpg", "unreadable"),
        (f"{place}#2", "unreadable"),
    ]


def test_parquet_is_cut_at_row_groups_and_within_large_ones(tmp_path: Path) -> None:
    table = pa.table({"image": [bytes([k]) for k in range(100)]})
    for group_size in (7, 100):
        path = tmp_path / f"{group_size}.parquet"
        pq.write_table(table, path, row_group_size=group_size)
        shards = list(cut(open_inputs(str(path)).entries(), version="v", shard_size=10))
        assert len(shards) > 4
        assert [source.read()[0] for shard in shards for source in sources(shard)] == list(range(100))


def read_all(path: Path, shard_size: int = 10, **options) -> list[tuple[str, bytes | str]]:
    """Every source of an input with its bytes, or with its error."""
    found: list[tuple[str, bytes | str]] = []
    for shard in cut(open_inputs(str(path)).entries(), version="v", shard_size=shard_size, **options):
        before = len(found)
        for source in sources(shard, column=options.get("column")):
            try:
                found.append((source.uri, source.read()))
            except ImageError as error:
                found.append((source.uri, str(error)))
        assert shard.rows in (-1, len(found) - before), "as many sources as were planned"
    return found


def test_damage_in_parquet_costs_its_row_group_and_no_row(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"image": [f"image {k} ".encode() * 100 for k in range(100)]})
    pq.write_table(table, path, row_group_size=25, compression="snappy", use_dictionary=False)
    page = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[page : page + 20] = b"\xff" * 20
    path.write_bytes(data)
    found = read_all(path)
    assert [uri for uri, _ in found] == [f"{path}#{k}" for k in range(100)]
    damaged = {k for k, (_, content) in enumerate(found) if isinstance(content, str)}
    assert damaged == set(range(25, 50))
    assert "row group 1 is damaged" in str(found[30][1])


def test_names_in_parquet_that_are_no_text_cost_their_row_group(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    name = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"image": [b"1", b"2", b"3"], "path": name}), path, row_group_size=2)
    found = read_all(path)
    assert len(found) == 3 and found[2] == ("c", b"3")
    assert all("row group 0 is damaged" in str(content) for _, content in found[:2])


def test_a_link_out_of_the_roots_is_one_row_and_not_opened(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    pq.write_table(pa.table({"secret": [1, 2, 3]}), tmp_path / "x.parquet")
    (inside / "link.parquet").symlink_to(tmp_path / "x.parquet")
    (shard,) = cut(open_inputs(str(inside)).entries(), version="v", shard_size=10, roots=[str(inside)])
    (source,) = sources(shard, roots=[str(inside)])
    assert shard.rows == 1
    with pytest.raises(ImageError, match="outside the roots"):
        source.read()


def test_parquet_that_changes_after_planning_keeps_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [b"1"] * 20}), path)
    (shard,) = cut(open_inputs(str(path)).entries(), version="v", shard_size=100)
    pq.write_table(pa.table({"image": [b"1"] * 5}), path)
    assert len(list(sources(shard))) == 20
    path.unlink()
    found = list(sources(shard))
    assert len(found) == 20
    with pytest.raises(ImageError, match="No such file"):
        found[7].read()
    path.write_bytes(b"PAR1 not now")
    (unread,) = cut(open_inputs(str(path)).entries(), version="v", shard_size=100)
    pq.write_table(pa.table({"image": [b"1"] * 5}), path)
    (source,) = sources(unread)
    with pytest.raises(ImageError, match="run the command again"):
        source.read()


def test_a_column_that_is_not_there_is_said_before_anything_is_scored(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [b"1"], "other": ["x"], "n": [1]}), path)
    assert read_all(path, column="other") == [(f"{tmp_path}/x", "unreadable: No such file or directory")]
    for column in ("typo", "n"):
        with pytest.raises(UsageError, match=f"no column '{column}' of images or URIs among image, other, n"):
            read_all(path, column=column)
    pq.write_table(pa.table({"n": [1]}), path)
    with pytest.raises(UsageError, match="name it with --column"):
        read_all(path)


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
def test_a_disk_that_fails_stops_the_job_instead_of_losing_rows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    if name == "x.tar":
        (tmp_path / "one.jpg").write_bytes(b"x" * 40_000)
        with tarfile.open(path, "w") as archive:
            for k in range(20):
                archive.add(tmp_path / "one.jpg", f"{k}.jpg")
    else:
        pq.write_table(pa.table({"image": [os.urandom(40_000) for _ in range(20)]}), path, row_group_size=5)
    (shard,) = cut(open_inputs(str(path)).entries(), version="v", shard_size=100)

    class Failing(io.FileIO):
        def readinto(self, buffer) -> int:
            if 200_000 < self.tell() < 600_000:
                raise OSError(errno.EIO, "Input/output error")
            return super().readinto(buffer)

        def read(self, size: int = -1) -> bytes:
            data = bytearray(size)
            return bytes(data[: self.readinto(data)])

    monkeypatch.setattr(store, "open_file", lambda place: Failing(place))
    with pytest.raises(StoreError, match=r"broke off .*run the command again"):
        list(sources(shard))


def test_what_lies_beside_the_scores_is_no_input(tmp_path: Path) -> None:
    for name in ("a.jpg", "_overlays/most-001.png", "b/_c/d.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    inputs = open_inputs(str(tmp_path), exclude=str(tmp_path))
    assert places(inputs) == [f"{tmp_path}/a.jpg", f"{tmp_path}/b/_c/d.jpg"]


def test_webdataset_and_damaged_containers_become_rows(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (tmp_path / "x.jpg").write_bytes(b"x" * 5000)
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name in ("k/1.jpg", "k/1.cls", "k/ü.png"):
            archive.add(tmp_path / "x.jpg", name)
    (folder / "b.tar").write_bytes((folder / "a.tar").read_bytes()[:8000])
    (folder / "broken.parquet").write_bytes(b"PAR1 no")
    inputs = open_inputs(str(folder))
    found = [source for shard in cut(inputs.entries(), version="v", shard_size=10) for source in sources(shard)]
    names = [printable(source.uri).removeprefix(f"{folder}/") for source in found]
    assert names == ["a.tar#k/1.jpg", "a.tar#k/ü.png", "b.tar#k/1.jpg", "b.tar", "broken.parquet"]
    for source in found[-2:]:
        with pytest.raises(ImageError, match=r"^unreadable: "):
            source.read()


def test_names_that_are_no_text(tmp_path: Path) -> None:
    name = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.jpg"))
    name.write_bytes(b"x")
    (shard,) = cut(open_inputs(str(tmp_path)).entries(), version="v", shard_size=10)
    (source,) = sources(shard)
    assert source.read() == b"x"
    assert printable(source.uri).endswith("\\xff\\xfe.jpg")


@pytest.mark.parametrize("text", ["no/such/folder", "/no/such/*/x.jpg.nothing?"])
def test_nothing_there(text: str, tmp_path: Path) -> None:
    try:
        assert places(open_inputs(str(tmp_path / text))) == []
    except UsageError as error:
        assert "no such file or folder" in str(error)
