"""Places of batches, whose number changes with the devices."""

from __future__ import annotations

import asyncio
from pathlib import Path

from sfumato.api.batches.places import Places
from support.inside import Inside


async def turn() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def holders(places: Places, count: int) -> tuple[list[int], list[asyncio.Task[None]]]:
    got: list[int] = []

    async def hold(number: int) -> None:
        await places.take()
        got.append(number)

    tasks = [asyncio.create_task(hold(number)) for number in range(count)]
    await turn()
    return got, tasks


def test_places_are_given_in_order_and_follow_their_number() -> None:
    async def check() -> None:
        places = Places(2)
        got, tasks = await holders(places, 7)
        assert got == [0, 1]
        places.resize(4)
        await turn()
        assert got == [0, 1, 2, 3]
        places.resize(1)  # those that are held stay
        for _ in range(3):
            places.give()
        await turn()
        assert got == [0, 1, 2, 3]
        places.give()
        await turn()
        assert got == [0, 1, 2, 3, 4]
        tasks[5].cancel()
        places.give()
        await turn()
        assert got == [0, 1, 2, 3, 4, 6]

    asyncio.run(check())


def test_a_place_that_comes_with_a_cancellation_is_given_on() -> None:
    async def check() -> None:
        places = Places(0)
        got, tasks = await holders(places, 2)
        places.give()
        tasks[0].cancel()
        await turn()
        assert got == [1]

    asyncio.run(check())


def test_batches_have_as_many_as_the_queue(tmp_path: Path) -> None:
    """Also after a device has gone or come back."""
    inside = Inside(tmp_path, max_active=4)
    with inside.client() as client:
        assert client.portal
        batches = inside.app.state.batches
        for places in (1, 8):
            client.portal.call(inside.service.queue.resize, places)
            client.portal.call(batches.look)
            assert batches._places._count == places
