"""Batches: as large as can be while the engine is busy, and no item lost, mixed up, or waiting for ever."""

from __future__ import annotations

import asyncio

import pytest

from serving.gathering import Gathering


def test_batches_fill_while_the_engine_is_busy() -> None:
    sizes: list[int] = []

    async def together(items: list[int]) -> list[int]:
        sizes.append(len(items))
        await asyncio.sleep(0.05)
        return [2 * item for item in items]

    async def crowd() -> None:
        gathering = Gathering(together)
        gathering.batch_size = 8
        decoding = asyncio.Semaphore(1)

        async def client(number: int) -> None:
            for k in range(6):
                async with decoding:  # pictures come one after the other
                    await asyncio.sleep(0.002)
                assert await gathering(100 * number + k) == 2 * (100 * number + k)

        await asyncio.gather(*map(client, range(16)))

    asyncio.run(crowd())
    assert sum(sizes) == 96
    assert max(sizes) == 8
    assert len(sizes) <= 20  # 12 full ones, and some at the beginning and the end


def test_the_first_waits_for_others_but_not_for_ever() -> None:
    sizes: list[int] = []

    async def together(items: list[int]) -> list[int]:
        sizes.append(len(items))
        return items

    async def few() -> None:
        gathering = Gathering(together)
        gathering.batch_size, gathering.wait_s = 2, 0.2
        first = asyncio.create_task(gathering(1))
        await asyncio.sleep(0.02)
        assert await asyncio.gather(first, gathering(2)) == [1, 2]
        async with asyncio.timeout(5):
            assert await gathering(3) == 3

    asyncio.run(few())
    assert sizes == [2, 1]


def test_an_error_is_everybodys_and_the_next_batch_is_new() -> None:
    async def together(items: list[int]) -> list[int]:
        await asyncio.sleep(0.02)
        if 13 in items:
            raise ValueError("thirteen")
        return items

    async def some() -> None:
        gathering = Gathering(together)
        gathering.batch_size, gathering.wait_s = 3, 0.05
        leaving = asyncio.create_task(gathering(0))
        found = asyncio.gather(gathering(12), gathering(13), return_exceptions=True)
        await asyncio.sleep(0.01)
        leaving.cancel()
        assert [type(error) for error in await found] == [ValueError, ValueError]
        assert await gathering(14) == 14
        with pytest.raises(asyncio.CancelledError):
            await leaving

    asyncio.run(some())
