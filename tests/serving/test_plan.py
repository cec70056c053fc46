"""Shards are decided by content: the same for whoever plans, and nearly the same after a small change."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.folders import Entry
from serving.plan import LARGEST_SHARD, choose_shard_size, cut, read_plan, read_shard, write_plan


def listing(count: int, *, without: int | None = None, touched: int | None = None) -> list:
    names = [k for k in range(count) if k != without]
    return [("image", Entry(f"/data/{k:06d}.jpg", 100 + k, "new" if k == touched else "old")) for k in names]


def keys(entries: list, version: str = "v") -> list[str]:
    return [shard.key for shard in cut(entries, version=version, shard_size=64)]


def test_every_input_once_in_shards_of_about_the_size() -> None:
    shards = list(cut(listing(10_000), version="v", shard_size=64))
    assert [uri for shard in shards for uri in shard.uris] == [entry.place for _, entry in listing(10_000)]
    assert max(shard.rows for shard in shards) <= 128
    assert 40 < 10_000 / len(shards) < 90
    assert len({shard.key for shard in shards}) == len(shards)


def test_a_new_a_removed_or_a_changed_file_moves_few_shards() -> None:
    before = keys(listing(10_000))
    assert keys(listing(10_000)) == before
    for after in (listing(10_000, without=4321), listing(10_001), listing(10_000, touched=17)):
        assert len(set(keys(after)) - set(before)) <= 3
    assert not set(keys(listing(10_000), "other engine")) & set(before)


def test_a_stored_plan_is_read_back(tmp_path: Path) -> None:
    shards = list(cut(listing(40_000), version="v", shard_size=64))
    plan = write_plan(shards, str(tmp_path / "plans"), others={".txt": 2})
    assert read_plan(str(tmp_path / "plans"), plan.id) == plan
    assert plan.rows == 40_000
    assert len({planned.file for planned in plan.shards}) > 1
    for planned, shard in list(zip(plan.shards, shards, strict=True))[::97]:
        assert read_shard(plan.folder, planned.file, planned.group) == shard
    assert read_plan(str(tmp_path / "plans"), "none") is None


def test_shard_size_grows_with_the_set() -> None:
    assert [choose_shard_size(n) for n in (1, 2_000, 20_000, 10**8)] == [32, 32, 512, LARGEST_SHARD]
