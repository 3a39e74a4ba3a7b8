"""`time_limit_s`: of a request, queueing included; of a picture of a stored request, from when the engine begins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sfumato.config import ModelConfig
from sfumato.core import Done, Event, Generation, Step
from sfumato.engine.protocol import Placed, Started
from sfumato.engine.streams import Streams
from sfumato.errors import TimedOut
from sfumato.serving import repeat
from sfumato.serving.catalog import Catalog
from sfumato.serving.job import Job
from sfumato.serving.planning import ImageRequest
from sfumato.serving.service import Service
from sfumato.serving.time_limits import DrawingTime
from sfumato.settings import Settings
from support.fake_engine import FakeEngine, recipe_of

LIMIT_S = 1

SCRIPT: dict[str, tuple[bool | str, ...]] = {
    "waits in the engine": (),
    "loads its model": (True, False),
    "waits on its device": (False, "m:0"),
    "is drawn": (True,),
    "is loaded and drawn": (True, False, True),
}
"""What the engine says of its place or its device, by prompt; then nothing until it is let go on."""


class Told(FakeEngine):
    """Says of each picture what `SCRIPT` has, and ends it once `hold` is set.

    What it says overtakes the step before, as with every engine: steps are queued for their reader.
    """

    async def submit(self, config: ModelConfig, generation: Generation) -> AsyncGenerator[Event, None]:
        for said in SCRIPT.get(generation.prompt, ()):
            if isinstance(said, str):
                self.on_device(generation.id, said)
            else:
                self.on_place(generation.id, said)
        self.arrived.put_nowait(generation.seed)
        yield Step(1, 2)
        await self.hold.wait()
        yield Step(2, 2)
        yield Done(b"", recipe_of(config, generation))


@pytest.fixture
def service(tmp_path: Path) -> Service:
    (tmp_path / "a.yaml").write_text("name: a\nparameters:\n  model: some/one\n")
    return Service(Catalog([tmp_path]), Told(), Settings(time_limit_s=LIMIT_S, max_active=1))


async def stored(service: Service, prompt: str) -> Job:
    """As `Jobs` submits what is stored."""
    token = repeat.CURRENT.set(repeat.Repeatable("0" * 32, 0.0))
    try:
        return await service.submit(ImageRequest(prompts=[prompt]))
    finally:
        repeat.CURRENT.reset(token)


@asynccontextmanager
async def a_limit_later(service: Service) -> AsyncGenerator[None]:
    """Ends once a request that came after all others has waited for the whole limit."""
    yield
    with pytest.raises(TimedOut, match="not drawn within 1 s"):
        await service.draw(ImageRequest(prompts=["behind them"]))


def with_held_engine(service: Service, steps: Callable[[FakeEngine], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        assert isinstance(service.engine, FakeEngine)
        service.engine.hold = asyncio.Event()
        await steps(service.engine)

    asyncio.run(run())


def test_the_queue_counts_for_others_and_not_for_what_is_stored(service: Service) -> None:
    async def steps(engine: FakeEngine) -> None:
        async with a_limit_later(service):
            jobs = [await stored(service, "waits in the engine"), await stored(service, "waits in the queue")]
        assert not any(job.over for job in jobs)
        engine.hold.set()
        for job in jobs:
            assert len(await job.pictures()) == 1

    with_held_engine(service, steps)


@pytest.mark.parametrize(("prompt", "places"), [("loads its model", 0), ("waits on its device", 1)])
def test_before_it_begins_and_while_its_model_is_loaded_no_time_counts(
    service: Service, prompt: str, places: int
) -> None:
    async def steps(engine: FakeEngine) -> None:
        async with a_limit_later(service):
            job = await stored(service, prompt)
            await engine.arrived.get()
            assert service.queue.running == places
        assert not job.over
        engine.hold.set()
        assert len(await job.pictures()) == 1

    with_held_engine(service, steps)


@pytest.mark.parametrize("prompt", ["is drawn", "is loaded and drawn"])
def test_what_is_drawn_for_so_long_ends(service: Service, prompt: str) -> None:
    async def steps(engine: FakeEngine) -> None:
        job = await stored(service, prompt)
        with pytest.raises(TimedOut, match=r"drawn for 1 s without an end \(the setting time_limit_s\)"):
            await job.pictures()
        assert service.queue.running == 0

    with_held_engine(service, steps)


def test_time_used_before_a_pause_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes by hand. Given the whole limit again after the pause, it would be drawn to its end."""
    now = 0.0
    passed: list[float] = []

    async def run() -> None:
        nonlocal now
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
        async with DrawingTime(1.0) as drawing:
            for counting, seconds in ((True, 0.75), (False, 5.0), (True, 0.125), (True, 0.25), (True, 0.25)):
                drawing.count(counting)
                now += seconds
                for _ in range(3):  # the loop looks at its clock between
                    await asyncio.sleep(0)
                passed.append(seconds)

    with pytest.raises(TimedOut):
        asyncio.run(run())
    assert passed == [0.75, 5.0, 0.125]


def test_the_engine_says_when_it_begins() -> None:
    told: list[tuple[str, bool]] = []
    streams = Streams(lambda id, taken: told.append((id, taken)))
    for report in (Started("x"), Placed("x", False), Placed("x", True)):
        streams.deliver(report)
    assert told == [("x", True), ("x", False), ("x", True)]
