"""Several workers, one for each device: what happens to one is nothing to the others.

Against `stub_worker`: real processes on the real wire, without torch.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sfumato.commands import serve
from sfumato.config.parse import config_for
from sfumato.core import Done, Event, Failed, Generation, Step
from sfumato.engine.protocol import Load
from sfumato.errors import ModelTooLarge, SfumatoError, WorkerDied
from sfumato.process import accelerators, supervisor
from sfumato.process.devices import Devices, labels
from sfumato.process.supervisor import Supervisor
from sfumato.sampling import Sampling
from sfumato.settings import Settings, device_names
from support.stub_worker import gate_of, lives, stub

SETTINGS = Settings(log_level="critical", max_active=4)
CONFIG = config_for("some/model")
PATIENCE_S = 300
LONG = 1500
"""Steps that are expected to take minutes, before anything was measured: longer than any load."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MAX_BACKOFF_S", 0.05)
    monkeypatch.setattr(supervisor, "UNUSABLE_S", 0.05)
    monkeypatch.setattr(supervisor, "STOP_TIMEOUT_S", 0.5)


class Two:
    """Two devices, `cpu:0` and `cpu:1`, whose workers' lives begin as they say; `drew` says which drew what."""

    def __init__(self, folder: Path, *beginnings: str) -> None:
        self.folders = [folder / "0", folder / "1"]
        self.engine = Devices(SETTINGS, ["cpu", "cpu"])
        for worker, own, beginning in zip(self.engine._workers, self.folders, beginnings, strict=True):
            own.mkdir()
            worker._command = tuple(stub(own, *beginning.split(",")))
        self.drew: dict[str, list[str]] = {}
        self.places: list[int] = []
        self.engine.on_device = lambda id, device: self.drew.setdefault(id, []).append(device)
        self.engine.on_places = self.places.append

    @property
    def gates(self) -> list[Path]:
        return [gate_of(each) for each in self.folders]

    async def answer(self, prompt: str, id: str = "", steps: int | None = None) -> Event:
        """The last event of a picture."""
        picture = Generation(id=id or prompt, prompt=prompt, seed=7, sampling=Sampling(steps=steps))
        async with aclosing(self.engine.submit(CONFIG, picture)) as events:
            async for event in events:
                last = event
        return last

    async def begun(self, id: str, steps: int | None = None) -> asyncio.Task[Event]:
        """A picture that has made its first step, and waits at the gate of its device."""
        first = asyncio.Event()

        async def drawn() -> Event:
            picture = Generation(id=id, prompt="gated", seed=7, sampling=Sampling(steps=steps))
            async with aclosing(self.engine.submit(CONFIG, picture)) as events:
                async for event in events:
                    first.set()
                    last = event
            return last

        task = asyncio.create_task(drawn())
        await first.wait()
        return task

    def kill(self, number: int) -> None:
        pid = self.engine._workers[number].pid
        assert pid
        os.kill(pid, signal.SIGKILL)

    async def until(self, true: Callable[[], Any]) -> None:
        while not true():  # noqa: ASYNC110, there is no event of its becoming true
            await asyncio.sleep(0.01)

    async def both_up(self) -> None:
        await self.until(lambda: all(state.ready for state in self.engine.devices))


def run(two: Two, work: Callable[[Two], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await two.engine.start()
            try:
                await work(two)
            finally:
                await two.engine.stop()

    asyncio.run(whole())


def test_pictures_of_one_model_stay_where_it_is(tmp_path: Path) -> None:
    async def work(two: Two) -> None:
        await two.both_up()
        for number in range(4):
            assert isinstance(await two.answer("a cat", str(number)), Done)
        assert two.drew == {str(number): ["cpu:0"] for number in range(4)}
        assert [set(state.models) for state in two.engine.devices] == [{CONFIG.name}, set()]
        assert two.engine.status(CONFIG.name).state == "ready"

    run(Two(tmp_path, "well", "well"), work)


def test_what_would_wait_longer_than_a_load_goes_to_another_device(tmp_path: Path) -> None:
    async def work(two: Two) -> None:
        await two.both_up()
        for gate in two.gates:
            gate.touch()
        first = await two.begun("first", LONG)
        second = await two.begun("second", LONG)
        assert two.drew == {"first": ["cpu:0"], "second": ["cpu:1"]}
        assert [state.pictures for state in two.engine.devices] == [1, 1]
        for gate in two.gates:
            gate.unlink()
        assert [type(await each) for each in (first, second)] == [Done, Done]

    run(Two(tmp_path, "well", "well"), work)


def test_a_death_touches_only_the_pictures_of_its_device(tmp_path: Path) -> None:
    async def work(two: Two) -> None:
        await two.both_up()
        for gate in two.gates:
            gate.touch()
        first, second = await two.begun("first", LONG), await two.begun("second", LONG)
        two.kill(0)
        two.gates[0].unlink()
        assert isinstance(await first, Done)  # by the next worker of its device, while the other still draws
        assert not second.done()
        two.gates[1].unlink()
        assert isinstance(await second, Done)
        assert two.drew == {"first": ["cpu:0"], "second": ["cpu:1"]}
        assert [state.stats.restarts for state in two.engine.devices] == [1, 0]

    two = Two(tmp_path, "well", "well")
    run(two, work)
    assert [lives(each) for each in two.folders] == [2, 1]


def test_what_only_waited_at_a_worker_that_died_is_drawn_elsewhere_meanwhile(tmp_path: Path) -> None:
    async def work(two: Two) -> None:
        await two.both_up()
        for gate in two.gates:
            gate.touch()
        suspect, busy = await two.begun("suspect", LONG), await two.begun("busy", LONG)
        waiting = asyncio.create_task(two.answer("a cat"))
        await two.until(lambda: "a cat" in two.drew)
        two.kill(0)
        two.gates[1].unlink()
        assert isinstance(await waiting, Done)  # while the next worker of its device waits at the gate
        assert two.drew == {"suspect": ["cpu:0"], "busy": ["cpu:1"], "a cat": ["cpu:0", "cpu:1"]}
        assert not suspect.done()
        two.gates[0].unlink()
        assert [type(await each) for each in (busy, suspect)] == [Done, Done]
        assert two.drew["suspect"] == ["cpu:0"]

    run(Two(tmp_path, "well,gated", "well"), work)


def test_what_a_lost_device_was_drawing_is_drawn_elsewhere(tmp_path: Path) -> None:
    """It does not come back."""

    async def work(two: Two) -> None:
        await two.both_up()
        two.gates[0].touch()
        suspect = await two.begun("suspect")
        two.kill(0)
        assert isinstance(await suspect, Done)
        assert two.drew["suspect"] == ["cpu:0", "cpu:1"]
        lost, other = two.engine.devices
        assert not lost.ready
        assert "it has gone" in lost.problem
        assert (other.ready, other.problem, other.stats.restarts) == (True, "", 0)
        assert two.places[-1] == SETTINGS.max_active

    run(Two(tmp_path, "well,unusable", "well"), work)


def test_a_picture_that_kills_two_workers_is_failed_wherever_they_were(tmp_path: Path) -> None:
    async def work(two: Two) -> None:
        await two.both_up()
        failed, drawn = await asyncio.gather(two.answer("die"), two.answer("a cat"))
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, WorkerDied)
        assert "2 times" in failed.error.message
        assert isinstance(drawn, Done)
        assert two.drew["die"] == ["cpu:0", "cpu:1"]
        await two.until(lambda: two.engine.devices[1].stats.restarts == 1)

    run(Two(tmp_path, "well,unusable", "well"), work)


@pytest.mark.parametrize("fault", ["unusable", "die", "noise"])
def test_a_device_that_does_not_start_is_told_and_the_other_serves(tmp_path: Path, fault: str) -> None:
    async def work(two: Two) -> None:
        answers = await asyncio.gather(*(two.answer("a cat", str(number)) for number in range(8)))
        assert all(isinstance(each, Done) for each in answers)
        await two.until(lambda: two.engine.devices[0].problem)
        assert two.engine.ready
        assert two.places[-1] == SETTINGS.max_active
        assert isinstance(await two.answer("a dog"), Done)
        assert two.drew["a dog"] == ["cpu:1"]

    run(Two(tmp_path, fault, "well"), work)


def test_a_device_that_comes_back_draws_again(tmp_path: Path) -> None:
    async def work(two: Two) -> None:
        await two.until(lambda: two.engine.devices[0].problem)
        await two.both_up()
        assert two.places[-1] == 2 * SETTINGS.max_active
        assert [state.problem for state in two.engine.devices] == ["", ""]

    run(Two(tmp_path, "unusable,die,well", "well"), work)


def test_if_none_starts_pictures_fail_as_with_one(tmp_path: Path) -> None:
    async def work(two: Two) -> None:
        failed = await two.answer("hopeless")
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, WorkerDied)
        assert "does not start" in failed.error.message
        assert not two.engine.ready

    run(Two(tmp_path, "die", "unusable"), work)


def test_a_model_too_large_for_one_device_is_drawn_on_another(tmp_path: Path) -> None:
    async def work(two: Two) -> None:
        await two.both_up()
        assert isinstance(await two.answer("too large for 0"), Done)
        assert two.drew["too large for 0"] == ["cpu:0", "cpu:1"]
        assert isinstance(await two.answer("too large for 0", "again"), Done)
        assert two.drew["again"] == ["cpu:1"]  # it is known by now
        refused = await two.answer("too large for 1")
        assert isinstance(refused, Failed)  # by both
        assert isinstance(refused.error, ModelTooLarge)

    run(Two(tmp_path, "well", "well"), work)


def test_what_a_request_adds_bars_no_model_from_a_device(tmp_path: Path) -> None:
    async def work(two: Two) -> None:
        await two.both_up()
        refused = await two.answer("addition too large")
        assert isinstance(refused, Failed)
        assert "its LoRA" in refused.error.message
        assert two.drew["addition too large"] == ["cpu:0", "cpu:1"]
        for gate in two.gates:
            gate.touch()
        pictures = [await two.begun(id, LONG) for id in ("first", "second")]
        assert {*two.drew["first"], *two.drew["second"]} == {"cpu:0", "cpu:1"}
        for gate in two.gates:
            gate.unlink()
        assert [type(await each) for each in pictures] == [Done, Done]

    run(Two(tmp_path, "well", "well"), work)


def test_once_all_have_refused_a_model_it_is_tried_again(tmp_path: Path) -> None:
    """There may be room by then."""

    async def work(two: Two) -> None:
        await two.both_up()
        for prompt in ("too large for 0", "too large for 1"):
            await two.answer(prompt)
        await two.answer("too large for 0", "again")
        assert two.drew["again"] == ["cpu:1"]  # there it is loaded by now
        assert two.engine._unfit_for(CONFIG) == set()

    run(Two(tmp_path, "well", "well"), work)


def test_a_suspect_from_another_device_waits_until_it_is_alone(tmp_path: Path) -> None:
    async def work(two: Two) -> None:
        await two.both_up()
        for gate in two.gates:
            gate.touch()
        suspect, innocent = [await two.begun(id, LONG) for id in ("suspect", "innocent")]
        assert (two.drew["suspect"], two.drew["innocent"]) == (["cpu:0"], ["cpu:1"])
        two.kill(0)
        await two.until(lambda: two.drew["suspect"] == ["cpu:0", "cpu:1"])
        assert not two.engine._workers[1]._flights["suspect"].sent
        two.gates[1].unlink()
        assert [type(await each) for each in (innocent, suspect)] == [Done, Done]

    run(Two(tmp_path, "well,unusable", "well"), work)


def test_a_model_is_loaded_elsewhere_if_a_worker_does_not_start(tmp_path: Path) -> None:
    async def work(two: Two) -> None:
        assert (await two.engine.carry_out(Load(CONFIG))).error is None
        assert two.engine.devices[1].models[CONFIG.name].state == "ready"
        two.engine.order(Load(config_for("another/model")))
        await two.until(lambda: "another/model" in two.engine.devices[1].models)

    run(Two(tmp_path, "unusable,unusable", "well"), work)


def test_models_that_are_loaded_before_the_workers_are_up_are_spread() -> None:
    engine = Devices(SETTINGS, ["cpu", "cpu"])
    assert [engine._for_load(config_for(name)) for name in ("a/one", "a/two", "a/one")] == [0, 1, 0]


def test_what_only_one_device_can_have_waits_for_its_next_worker(tmp_path: Path) -> None:
    """The other device is up, and too small."""

    async def work(two: Two) -> None:
        await two.both_up()
        assert isinstance(await two.answer("too large for 0"), Done)
        two.gates[1].touch()
        suspect = await two.begun("suspect")
        waiting = asyncio.create_task(two.answer("a cat"))
        await two.until(lambda: "a cat" in two.drew)
        two.kill(1)
        two.gates[1].unlink()
        assert [type(await each) for each in (suspect, waiting)] == [Done, Done]
        assert set(two.drew["suspect"] + two.drew["a cat"]) == {"cpu:1"}

    run(Two(tmp_path, "well", "well,die,well"), work)


def test_a_picture_that_is_left_is_forgotten(tmp_path: Path) -> None:
    async def work(two: Two) -> None:
        await two.both_up()
        two.gates[0].touch()
        picture = Generation(id="left", prompt="gated", seed=7)
        async with aclosing(two.engine.submit(CONFIG, picture)) as events:
            assert isinstance(await anext(events), Step)
        two.gates[0].unlink()
        assert [state.pictures for state in two.engine.devices] == [0, 0]
        assert two.engine._router.wait_s(0) == 0
        assert isinstance(await two.answer("next"), Done)

    run(Two(tmp_path, "well", "well"), work)


def test_stop_fails_what_is_not_drawn_and_moves_nothing(tmp_path: Path) -> None:
    async def work(two: Two) -> None:
        await two.both_up()
        two.gates[0].touch()
        picture = await two.begun("cut off")
        await two.engine.stop()
        failed = await picture
        assert isinstance(failed, Failed)
        assert two.drew == {"cut off": ["cpu:0"]}

    run(Two(tmp_path, "well", "well"), work)


# The setting.


def test_names_of_devices() -> None:
    assert device_names("") == []
    assert device_names("auto") == ["auto"]
    assert device_names("cuda, cuda:1,cpu") == ["cuda:0", "cuda:1", "cpu"]
    assert labels(["cuda:0", "cpu", "cpu"]) == ["cuda:0", "cpu:0", "cpu:1"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (",", "'' is no device"),
        ("cuda:0,,cuda:1", "'' is no device"),
        ("gpu0", "'gpu0' is no device"),
        ("cpu:1", "'cpu:1' is no device"),
        ("auto,cpu", "'auto' is no device"),
        ("cuda:0,cuda:0", "named 2 times"),
        ("cuda,cuda:0", "cuda:0 is named 2 times"),
    ],
)
def test_a_bad_list_is_an_error_that_says_what_is_valid(value: str, words: str) -> None:
    with pytest.raises(ValueError, match="devices") as raised:
        Settings.load({"devices": value}, {})
    assert words in str(raised.value)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The accelerators of the machine; none so far."""
    there: list[str] = []
    monkeypatch.setattr(accelerators, "names", lambda: list(there))
    return there


def devices_of(engine: Any) -> list[str]:
    return [state.name for state in engine.devices]


def test_without_the_setting_and_with_one_device_there_is_one_worker(machine: list[str]) -> None:
    machine.append("cuda:1")
    for settings in (Settings(), Settings(devices="cuda:1"), Settings(devices="auto"), Settings(devices="cpu")):
        assert isinstance(serve.engine_for(settings), Supervisor)
    assert devices_of(serve.engine_for(Settings(devices="cuda:1"))) == ["cuda:1"]


def test_auto_is_every_accelerator_or_the_cpu(machine: list[str]) -> None:
    assert devices_of(serve.engine_for(Settings(devices="auto"))) == ["cpu"]
    machine += ["cuda:0", "cuda:1", "cuda:2"]
    assert devices_of(serve.engine_for(Settings(devices="auto"))) == machine


def test_devices_that_are_not_there_are_an_error_if_all_are_missing(machine: list[str]) -> None:
    with pytest.raises(SfumatoError, match=r"devices='cuda:9': this machine has no cuda:9; its accelerators are: none"):
        serve.engine_for(Settings(devices="cuda:9"))
    machine.append("cuda:0")
    assert devices_of(serve.engine_for(Settings(devices="cuda:0,cuda:9"))) == ["cuda:0", "cuda:9"]


def test_both_settings_are_one_too_many() -> None:
    with pytest.raises(SfumatoError, match="only one of these settings"):
        serve.engine_for(Settings(devices="cpu,cpu", device="cpu"))


def test_main_memory_is_shared_and_all_else_is_of_each_device() -> None:
    engine = Devices(replace(SETTINGS, main_memory_mb=1000, memory_mb=300), ["cpu", "cpu", "cpu"])
    assert {(each._settings.main_memory_mb, each._settings.memory_mb) for each in engine._workers} == {(333, 300)}
    for unlimited in (0, -1):
        engine = Devices(replace(SETTINGS, main_memory_mb=unlimited), ["cpu", "cpu"])
        assert {each._settings.main_memory_mb for each in engine._workers} == {unlimited}
