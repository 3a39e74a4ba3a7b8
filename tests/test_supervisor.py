"""The keeper of the worker: whatever a worker writes or does not write, the next one is started.

Against `stub_worker`: a real process on the real wire, without torch.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from sfumato.api.app import create_app
from sfumato.config.parse import config_for
from sfumato.core import Done, Event, Failed, Generation, Step
from sfumato.engine.protocol import Load, Ordered, Unload
from sfumato.errors import Cancelled, RequestTooLarge, WorkerDied
from sfumato.pictures.stores import store_of
from sfumato.process import supervisor as module
from sfumato.process import wire
from sfumato.process.supervisor import Supervisor
from sfumato.serving.catalog import Catalog
from sfumato.serving.service import Service
from sfumato.settings import Settings
from sfumato.status import ModelStatus
from support.answerable import within
from support.hanging import replaced
from support.stub_worker import FRAMES, TOTAL, gate_of, lives, stub

SETTINGS = Settings(log_level="critical")
CONFIG = config_for("some/model")
PATIENCE_S = 300
PICTURES = 6
"""Of a round that a worker is killed in."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BACKOFF_S", 0.05)
    monkeypatch.setattr(module, "STOP_TIMEOUT_S", 0.5)


def run(work: Callable[[Supervisor], Coroutine[Any, Any, Any]], worker: list[str], **settings: Any) -> Any:
    async def whole() -> Any:
        supervisor = Supervisor(replace(SETTINGS, **settings), worker)
        async with asyncio.timeout(PATIENCE_S):
            await supervisor.start()
            try:
                return await work(supervisor)
            finally:
                await supervisor.stop()

    return asyncio.run(whole())


async def answer(supervisor: Supervisor, prompt: str, id: str | None = None) -> Event:
    generation = Generation(id=id or prompt.replace(":", "-"), prompt=prompt, seed=7)
    async with aclosing(supervisor.submit(CONFIG, generation)) as events:
        async for event in events:
            last = event
    assert isinstance(last, Done | Failed)
    return last


async def up(supervisor: Supervisor) -> None:
    await supervisor._up.wait()


FAULTS = [*FRAMES, "die", "deaf"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_that_breaks_while_it_draws_is_replaced_and_nothing_is_lost(tmp_path: Path, fault: str) -> None:
    async def work(supervisor: Supervisor) -> None:
        answers = await asyncio.gather(
            answer(supervisor, "before"), answer(supervisor, f"once:{fault}"), answer(supervisor, "after")
        )
        assert all(isinstance(found, Done) for found in answers)
        assert supervisor.ready
        assert supervisor.stats.restarts == 1

    run(work, stub(tmp_path))
    assert lives(tmp_path) == 2


def test_what_a_dead_worker_had_takes_no_place_until_the_next_starts_it(tmp_path: Path) -> None:
    told: dict[str, list[bool]] = {"once-die": [], "behind": []}

    async def work(supervisor: Supervisor) -> None:
        supervisor.on_place = lambda id, taken: told[id].append(taken)
        await asyncio.gather(answer(supervisor, "once:die"), answer(supervisor, "behind"))

    run(work, stub(tmp_path))
    assert told["behind"] == [False, True]
    # What a worker says last is lost if we write to it after its death.
    assert told["once-die"] in ([True, False, True], [False, True])


@pytest.mark.parametrize("fault", ["vanish", "noise", "truncated", "unknown", "die"])
def test_a_request_that_breaks_every_worker_is_failed_alone(tmp_path: Path, fault: str) -> None:
    async def work(supervisor: Supervisor) -> None:
        failed, drawn = await asyncio.gather(answer(supervisor, fault), answer(supervisor, "a neighbour"))
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, WorkerDied)
        assert "2 times" in failed.error.message
        assert isinstance(drawn, Done)
        await up(supervisor)

    run(work, stub(tmp_path))


@pytest.mark.parametrize("fault", ["noise", "truncated", "unreadable", "command", "none", "die", "deaf"])
def test_a_handshake_that_is_none_is_a_start_that_failed(tmp_path: Path, fault: str) -> None:
    async def work(supervisor: Supervisor) -> None:
        assert isinstance(await answer(supervisor, "patient"), Done)

    run(work, stub(tmp_path, fault, fault, "well"))
    assert lives(tmp_path) == 3


@pytest.mark.parametrize("fault", ["noise", "die", "hang"])
def test_starts_that_come_to_nothing_are_told_and_the_keeper_goes_on(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "hang":  # the handshake that never comes
        monkeypatch.setattr(module, "START_TIMEOUT_S", 1.0)

    async def work(supervisor: Supervisor) -> None:
        failed = await answer(supervisor, "hopeless")
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, WorkerDied)
        assert "does not start" in failed.error.message
        assert not supervisor.ready
        monkeypatch.undo()
        supervisor._command = tuple(stub(tmp_path, "well"))
        assert isinstance(await answer(supervisor, "later"), Done)

    run(work, stub(tmp_path, fault))


@pytest.mark.parametrize("bad", [1, 2, 99])
def test_starts_that_fail_are_repeated_and_then_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    """So many first starts end with a kill in the middle."""
    start, starts = subprocess.Popen, 0

    def killed(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        nonlocal starts
        process = start(*args, **kwargs)
        starts += 1
        if starts <= bad:
            process.kill()
        return process

    monkeypatch.setattr(subprocess, "Popen", killed)
    monkeypatch.setattr(module, "MAX_BACKOFF_S", 30.0)  # the fourth start is a second after the third

    async def work(supervisor: Supervisor) -> None:
        end = await answer(supervisor, "patient")
        assert starts == min(bad + 1, 3)
        if bad < 3:
            assert isinstance(end, Done)
        else:
            assert isinstance(end, Failed)
            assert isinstance(end.error, WorkerDied)
            assert "does not start" in end.error.message

    run(work, stub(tmp_path))


@pytest.mark.parametrize("seed", range(5))
def test_kill_9_at_any_moment_loses_nothing(tmp_path: Path, seed: int) -> None:
    """Ten times each. A round's requests are answered before the next kill: two deaths would make them suspects."""
    dice = random.Random(seed)

    async def work(supervisor: Supervisor) -> None:
        killed: set[int | None] = set()
        heard = moment = 0

        def kill() -> None:
            killed.add(supervisor.pid)
            assert supervisor.pid
            os.kill(supervisor.pid, signal.SIGKILL)

        async def drawn(id: str) -> list[Event]:
            nonlocal heard
            seen = []
            async with aclosing(supervisor.submit(CONFIG, Generation(id=id, prompt="a cat", seed=7))) as events:
                async for event in events:
                    seen.append(event)
                    heard += 1
                    if heard == moment:
                        kill()
            return seen

        for number in range(10):
            while supervisor.pid in killed:  # noqa: ASYNC110, there is no event of its end
                await asyncio.sleep(0.01)
            await up(supervisor)
            heard, moment = 0, dice.randrange(PICTURES * TOTAL)  # 0 is before the first event
            if moment == 0:
                asyncio.get_running_loop().call_soon(kill)
            each = await asyncio.gather(*(drawn(f"{number}-{at}") for at in range(PICTURES)))
            for events in each:
                assert isinstance(events[-1], Done)
                assert not any(isinstance(event, Done | Failed) for event in events[:-1])
        assert len(killed) == 10

    run(work, stub(tmp_path))


def test_what_a_worker_prints_disturbs_nobody(tmp_path: Path) -> None:
    async def work(supervisor: Supervisor) -> None:
        assert isinstance(await answer(supervisor, "quiet"), Done)
        assert supervisor.stats.restarts == 0

    run(work, stub(tmp_path, "stdout noise"))


def test_a_command_that_cannot_be_run_is_tried_again(tmp_path: Path) -> None:
    program = tmp_path / "worker"
    command = stub(tmp_path)

    async def work(supervisor: Supervisor) -> None:
        failed = await answer(supervisor, "hopeless")
        assert isinstance(failed, Failed)
        assert "FileNotFoundError" in failed.error.message
        (tmp_path / "new").write_text(f'#!/bin/sh\nexec {command[0]} "$@"\n')
        (tmp_path / "new").chmod(0o755)
        (tmp_path / "new").rename(program)
        assert isinstance(await answer(supervisor, "later"), Done)

    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    run(work, [str(program), *command[1:]])
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_an_error_of_taking_a_report_is_the_end_of_that_worker_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(supervisor: Supervisor) -> None:
        deliver = supervisor._streams.deliver
        raised: list[BaseException] = [ExceptionGroup("several", [ValueError("one"), OSError("two")])]

        def broken(report: Any) -> None:
            if raised and not isinstance(report, module.Ready):
                raise raised.pop()
            deliver(report)

        monkeypatch.setattr(supervisor._streams, "deliver", broken)
        assert isinstance(await answer(supervisor, "again"), Done)
        assert supervisor.stats.restarts == 1

    run(work, stub(tmp_path))


def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    async def work(supervisor: Supervisor) -> None:
        generation = Generation(id="once-hang", prompt="once:hang", seed=7)
        async with aclosing(supervisor.submit(CONFIG, generation)) as events:
            assert await anext(events) == Step(1, TOTAL)
            await replaced(supervisor)
            assert isinstance([event async for event in events][-1], Done)
        assert supervisor.stats.restarts == 1

    run(work, stub(tmp_path))


def test_a_cancel_while_there_is_no_worker_is_not_drawn_later(tmp_path: Path) -> None:
    async def work(supervisor: Supervisor) -> None:
        await up(supervisor)
        assert supervisor.pid
        os.kill(supervisor.pid, signal.SIGKILL)
        while supervisor.ready:  # noqa: ASYNC110, there is no event of its end
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(answer(supervisor, "die", "left early"))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert isinstance(await answer(supervisor, "next"), Done)
        assert supervisor.stats.restarts == 1

    run(work, stub(tmp_path))
    assert not (tmp_path / "seen left early").exists()


def test_a_worker_that_is_killed_with_a_command_on_its_way_loses_nothing(tmp_path: Path) -> None:
    """The pipe is broken in the middle of a message that is larger than the socket takes at once."""

    async def work(supervisor: Supervisor) -> None:
        await up(supervisor)
        assert supervisor.pid
        os.kill(supervisor.pid, signal.SIGSTOP)
        large = Generation(id="large", prompt="large", seed=1, images=(bytes(8 << 20),))

        async def drawn() -> Event:
            async with aclosing(supervisor.submit(CONFIG, large)) as events:
                async for event in events:
                    last = event
            return last

        waiting = asyncio.create_task(drawn())
        await asyncio.sleep(0)
        os.kill(supervisor.pid, signal.SIGKILL)
        assert isinstance(await waiting, Done)

    run(work, stub(tmp_path))


def test_a_request_too_large_for_the_wire_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_BYTES", 1 << 20)

    async def work(supervisor: Supervisor) -> None:
        await up(supervisor)
        large = Generation(id="large", prompt="large", seed=1, images=(bytes(2 << 20),))
        async with aclosing(supervisor.submit(CONFIG, large)) as events:
            failed = await anext(events)
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, RequestTooLarge)
        assert isinstance(await answer(supervisor, "small"), Done)
        assert supervisor.stats.restarts == 0

    run(work, stub(tmp_path))


def test_stop_ends_the_keeper_whatever_it_does(tmp_path: Path) -> None:
    async def work(supervisor: Supervisor) -> None:
        waiting = asyncio.create_task(answer(supervisor, "hopeless"))
        await asyncio.sleep(0)
        await supervisor.stop()
        failed = await waiting
        assert isinstance(failed, Failed)
        assert supervisor._supervision
        assert supervisor._supervision.done()

    run(work, stub(tmp_path, "hang"))
    run(work, ["/there/is/no/such/program"])


def test_readyz_says_whether_it_can_draw(tmp_path: Path) -> None:
    """Not before the handshake, not while the next one starts, and again after it."""
    (tmp_path / "m.yaml").write_text("name: m\nparameters:\n  model: some/one\n")
    settings = replace(SETTINGS, models=tmp_path, data=tmp_path / "data")
    supervisor = Supervisor(settings, stub(tmp_path, "gated"))
    app = create_app(Service(Catalog([tmp_path]), supervisor, settings), store_of(settings))
    gate = gate_of(tmp_path)
    gate.touch()

    def wait_for(client: TestClient, status: int, words: str) -> None:
        def seen() -> bool:
            found = client.get("/readyz")
            return found.status_code == status and words in found.text

        within(PATIENCE_S, seen)

    with TestClient(app) as client:
        wait_for(client, 503, "not up yet")
        gate.unlink()
        wait_for(client, 200, "ready")
        gate.touch()
        assert supervisor.pid
        os.kill(supervisor.pid, signal.SIGKILL)
        wait_for(client, 503, "died")
        assert client.get("/healthz").status_code == 200
        assert supervisor.status("m") == ModelStatus()
        gate.unlink()
        wait_for(client, 200, "ready")


def test_events_of_a_picture_come_in_order(tmp_path: Path) -> None:
    async def work(supervisor: Supervisor) -> list[Event]:
        generation = Generation(id="a", prompt="a", seed=1)
        async with aclosing(supervisor.submit(CONFIG, generation)) as events:
            return [event async for event in events]

    *steps, last = run(work, stub(tmp_path))
    assert steps == [Step(step, 4) for step in range(1, 5)]
    assert isinstance(last, Done)


def test_an_order_to_unload_needs_no_worker(tmp_path: Path) -> None:
    """Nothing is in memory then, and what was ordered before will not be."""

    async def work() -> None:
        supervisor = Supervisor(SETTINGS, stub(tmp_path))
        for name in ("one", "two"):
            supervisor.order(Load(replace(CONFIG, name=name)))
        assert await supervisor.carry_out(Unload("one")) == Ordered("")
        assert [order.config.name for order in supervisor._orders if isinstance(order, Load)] == ["two"]
        assert await supervisor.carry_out(Unload(None)) == Ordered("")
        assert not supervisor._orders

    asyncio.run(work())


def test_an_order_is_answered_though_its_worker_dies(tmp_path: Path) -> None:
    async def work(supervisor: Supervisor) -> None:
        assert isinstance(await answer(supervisor, "a cat"), Done)
        done = await supervisor.carry_out(Unload("m"))  # the stub does not know it, and ends
        assert isinstance(done.error, WorkerDied)

    run(work, stub(tmp_path))


def test_who_ordered_a_load_that_an_unload_overtakes_is_told() -> None:
    """No worker is up: the orders wait here."""

    async def run() -> list[Ordered]:
        engine = Supervisor(SETTINGS)
        loads = [asyncio.create_task(engine.carry_out(Load(config_for(name)))) for name in ("a/one", "a/two")]
        await asyncio.sleep(0)  # both are in line
        async with asyncio.timeout(60):
            assert await engine.carry_out(Unload(config_for("a/one").name)) == Ordered("")
            first = await loads[0]
            assert not loads[1].done()
            await engine.carry_out(Unload(None))
            return [first, await loads[1]]

    for ordered in asyncio.run(run()):
        assert isinstance(ordered.error, Cancelled)
        assert "before it was loaded" in ordered.error.message
