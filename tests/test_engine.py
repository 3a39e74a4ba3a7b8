"""The engine over its transports: one terminal event each, cancellation, a worker that dies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sfumato.config import ModelConfig
from sfumato.core import Done, Event, Failed, Generation, Preview, Step
from sfumato.engine.local import Local
from sfumato.engine.protocol import Engine
from sfumato.errors import Cancelled, LoadError, WorkerDied
from sfumato.process.supervisor import Supervisor
from sfumato.sampling import nested
from sfumato.serving.catalog import Catalog
from sfumato.settings import Settings
from support.hanging import hang

SETTINGS = Settings(device="cpu", log_level="error")
LARGE = {"width": 256, "height": 256}
"""So many steps of it take longer than any other process has to wait for its turn."""


@pytest.fixture(scope="module")
def config(repositories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("models")
    (folder / "m.yaml").write_text(
        f"name: m\nparameters:\n  model: {repositories['nitrosocke/Ghibli-Diffusion']}\ndtype: fp32\n"
    )
    return Catalog([folder]).get("m")


def wanted(id: str = "1", **fields: Any) -> Generation:
    return Generation(
        **nested({"id": id, "prompt": "a cat", "seed": 1, "steps": 3, "width": 64, "height": 64, **fields})
    )


class Running:
    """A started engine and the event loop it lives on, for several tests."""

    def __init__(self, make: Callable[[Settings], Engine]) -> None:
        self.engine = make(SETTINGS)
        self._runner = asyncio.Runner()
        self._runner.run(self.engine.start())

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        self._runner.run(work)

    def stop(self) -> None:
        self._runner.run(self.engine.stop())
        self._runner.close()


@pytest.fixture(scope="module", params=[Local, Supervisor])
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    running = Running(request.param)
    yield running
    running.stop()


async def events_of(engine: Engine, config: ModelConfig, generation: Generation) -> list[Event]:
    async with aclosing(engine.submit(config, generation)) as events:
        return [event async for event in events]


def test_steps_then_one_terminal_event(running: Running, config: ModelConfig) -> None:
    engine = running.engine

    async def run() -> None:
        answers = await asyncio.gather(*(events_of(engine, config, wanted(str(i), seed=i)) for i in range(3)))
        for seed, events in enumerate(answers):
            *steps, done = events
            assert steps == [Step(1, 4), Step(2, 4), Step(3, 4), Step(4, 4)]  # PNDM takes one more
            assert isinstance(done, Done)
            assert done.recipe.seed == seed
        assert engine.status("m").state == "ready"

    running.run(run())


def test_previews_come_between_the_steps(running: Running, config: ModelConfig) -> None:
    async def run() -> None:
        *events, done = await events_of(running.engine, config, wanted("shown", previews=2))
        kinds = [(type(event), event.step) for event in events if isinstance(event, Step | Preview)]
        assert kinds == [(Step, 1), (Preview, 1), (Step, 2), (Preview, 2), (Step, 3), (Step, 4)]
        assert isinstance(done, Done)

    running.run(run())


def test_what_was_done_is_counted(running: Running, config: ModelConfig) -> None:
    engine = running.engine

    async def run() -> None:
        before = engine.stats
        asked = [wanted(f"counted {i}", seed=i, steps=40) for i in range(3)]  # so many that they meet
        await asyncio.gather(*(events_of(engine, config, each) for each in asked))
        after = engine.stats  # complete when the last picture is there
        assert after.steps - before.steps == 3 * 41
        assert 0 < after.step_seconds - before.step_seconds < 600
        forwards = {size: count - before.batch_sizes.get(size, 0) for size, count in after.batch_sizes.items()}
        assert sum(size * count for size, count in forwards.items()) == 3 * 41  # each step of each is in one
        assert max(size for size, count in forwards.items() if count) > 1
        assert after.forwards > before.forwards + sum(forwards.values())  # encoders and decoders too
        assert after.loads >= 1
        assert after.resident_models == after.loads - after.evictions
        assert 50e6 < after.memory_bytes < 50e9
        assert after.restarts == 0

    running.run(run())


def test_facts_come_with_a_model_that_is_ready(running: Running, config: ModelConfig) -> None:
    engine = running.engine

    async def run() -> None:
        await events_of(engine, config, wanted("facts"))
        facts = engine.status("m").info
        assert facts is not None
        assert (facts.pipeline, facts.sampling.width, facts.dtype) == ("StableDiffusionPipeline", 64, "fp32")

    running.run(run())


def test_counts_never_go_down(config: ModelConfig) -> None:
    async def run() -> None:
        supervisor = Supervisor(SETTINGS)
        await supervisor.start()
        await events_of(supervisor, config, wanted("before"))
        before = supervisor.stats
        assert (before.steps, before.loads, before.restarts, before.resident_models) == (4, 1, 0, 1)
        kill(supervisor)
        await events_of(supervisor, config, wanted("after"))
        after = supervisor.stats
        assert (after.steps, after.loads, after.restarts, after.resident_models) == (8, 2, 1, 1)
        assert after.forwards == 2 * before.forwards
        assert after.batch_sizes == {size: 2 * count for size, count in before.batch_sizes.items()}
        await supervisor.stop()

    asyncio.run(run())


def test_closing_the_stream_stops_the_work_within_a_step(running: Running, config: ModelConfig) -> None:
    engine = running.engine

    async def run() -> None:
        before = engine.stats.steps
        async with aclosing(engine.submit(config, wanted("long", steps=900, **LARGE))) as events:
            async for event in events:
                assert isinstance(event, Step)
                if event.step == 3:
                    break
        *_, done = await events_of(engine, config, wanted("next"))
        assert isinstance(done, Done)
        assert engine.stats.steps - before < 900

    running.run(run())


def test_a_request_cancelled_in_the_queue_is_never_drawn(running: Running, config: ModelConfig) -> None:
    engine = running.engine

    async def run() -> None:
        before = engine.stats.steps
        first = asyncio.create_task(events_of(engine, config, wanted("first", steps=20)))
        second = asyncio.create_task(events_of(engine, config, wanted("second", steps=900, **LARGE)))
        third = asyncio.create_task(events_of(engine, config, wanted("third")))
        await asyncio.sleep(0)
        second.cancel()
        for task in (first, third):
            assert isinstance((await task)[-1], Done)
        assert engine.stats.steps - before < 900

    running.run(run())


def test_a_failed_load_fails_the_request_and_not_the_next(
    running: Running, config: ModelConfig, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yaml").write_text("name: bad\nparameters:\n  model: empty\n")
    bad = Catalog([tmp_path]).get("bad")

    engine = running.engine

    async def run() -> None:
        (failed,) = await events_of(engine, bad, wanted())
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, LoadError)
        assert engine.status("bad").state == "failed"
        assert isinstance((await events_of(engine, config, wanted()))[-1], Done)

    running.run(run())


def test_a_killed_worker_is_replaced_and_its_work_done_again(config: ModelConfig) -> None:
    async def run() -> None:
        supervisor = Supervisor(SETTINGS)
        await supervisor.start()
        *_, undisturbed = await events_of(supervisor, config, wanted("before", steps=50))
        answers: list[Event] = []
        async with aclosing(supervisor.submit(config, wanted("victim", steps=50))) as events:
            async for event in events:
                answers.append(event)
                if len(answers) == 2:
                    kill(supervisor)
        assert [event for event in answers if isinstance(event, Done | Failed)] == answers[-1:]
        assert answers[:2] + answers[-1:] == [Step(1, 51), Step(2, 51), undisturbed]
        await supervisor.stop()

    asyncio.run(run())


def test_a_generation_at_two_deaths_is_failed_and_the_others_go_on(config: ModelConfig) -> None:
    async def run() -> None:
        supervisor = Supervisor(replace(SETTINGS, max_active=1))
        await supervisor.start()
        poison = supervisor.submit(config, wanted("poison", steps=900, **LARGE))
        async with aclosing(poison):
            assert await anext(poison) == Step(1, 901)
            innocent = asyncio.create_task(events_of(supervisor, config, wanted("innocent")))
            kill(supervisor)
            async for event in poison:
                if event == Step(1, 901):
                    kill(supervisor)
                last = event
        assert isinstance(last, Failed)
        assert isinstance(last.error, WorkerDied)
        assert "2 times" in last.error.message
        assert isinstance((await innocent)[-1], Done)
        await supervisor.stop()

    asyncio.run(run())


def test_a_worker_that_hangs_is_replaced(config: ModelConfig) -> None:
    async def run() -> None:
        supervisor = Supervisor(SETTINGS)
        await supervisor.start()
        async with aclosing(supervisor.submit(config, wanted("victim", steps=40, **LARGE))) as events:
            assert isinstance(await anext(events), Step)
            await hang(supervisor)
            assert isinstance([event async for event in events][-1], Done)
        assert supervisor.stats.restarts == 1
        await supervisor.stop()

    asyncio.run(run())


def kill(supervisor: Supervisor) -> None:
    assert supervisor.pid
    os.kill(supervisor.pid, signal.SIGKILL)


def test_a_broken_loop_fails_what_waits(config: ModelConfig) -> None:
    async def run() -> None:
        local = Local(SETTINGS)
        await local.start()
        assert local._loop
        del local._loop._batcher  # an error of the loop's own, not of a request
        (failed,) = await events_of(local, config, wanted())
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, WorkerDied)
        await local.stop()

    asyncio.run(run())


def test_stopping_finishes_what_runs(config: ModelConfig) -> None:
    async def run() -> None:
        supervisor = Supervisor(SETTINGS)
        await supervisor.start()
        async with aclosing(supervisor.submit(config, wanted("last", steps=20))) as events:
            assert isinstance(await anext(events), Step)
            stopping = asyncio.create_task(supervisor.stop())
            assert isinstance([event async for event in events][-1], Done)
            await stopping
        assert not supervisor.ready

    asyncio.run(run())


def test_cancelled_is_not_a_retry() -> None:
    assert not Cancelled("x").retry
    assert Cancelled.status == 499
