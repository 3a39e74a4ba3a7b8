"""The engine on Ray with handles that are none: what a replica can answer, without a cluster. Run by test_ray.py."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from ray import exceptions as lost

from sfumato.config import ModelConfig
from sfumato.core import Failed, Generation
from sfumato.engine.protocol import DeviceState, Ordered, Pin, Placed, Unload
from sfumato.errors import NoWorker, WorkerDied
from sfumato.ray_serve import app, engine
from sfumato.ray_serve.messages import Begun, Item, ReplicaState
from sfumato.settings import Settings
from sfumato.status import EngineStats, ModelStatus

WANTED = Generation(id="1", prompt="", seed=1)


class Stream:
    """What a replica answers to one picture; a last exception is raised."""

    def __init__(self, items: Sequence[Item | Exception]) -> None:
        self._items = items

    async def __aiter__(self) -> AsyncIterator[Item]:
        for item in self._items:
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self) -> None:
        pass


class Handle:
    """Of a deployment. `streams`: one for each try. `looks`: what `state` answers, one after another."""

    def __init__(self, streams: Sequence[Stream] = (), looks: Sequence[Callable[[], list[Any]]] = ()) -> None:
        self._streams, self._looks = iter(streams), iter(looks)

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, *_: Any) -> Stream:
        return next(self._streams)

    def broadcast(self, *_: Any) -> Any:
        async def results_async(**_: Any) -> list[Any]:
            return next(self._looks)()

        return SimpleNamespace(results_async=results_async)


def drawn(*streams: Stream) -> Failed:
    async def draw() -> Any:
        began = asyncio.get_running_loop().time()
        on_ray: Any = engine.RayServe(Settings(), {"d": Handle(streams)}, {"d": ["m"]})  # type: ignore[dict-item]
        (last,) = [event async for event in on_ray.submit(ModelConfig(name="m", model="x"), WANTED)]
        assert asyncio.get_running_loop().time() - began >= sum(engine.PAUSES_S), "the tries follow each other at once"
        return last

    failed = asyncio.run(draw())
    assert isinstance(failed, Failed)
    return failed


def no_worker_is_told_as_such() -> None:
    vain = Stream([Begun("m:0"), Failed(NoWorker("the worker does not start"))])
    gone = Stream([Begun("m:0"), lost.RayActorError(error_msg="killed")])
    assert isinstance(drawn(*[vain] * 5).error, NoWorker)
    assert isinstance(drawn(*[gone] * 4, vain).error, NoWorker)
    assert type(drawn(*[vain] * 4, gone).error) is WorkerDied


def what_a_replica_has_begins_when_its_worker_says_so() -> None:
    told: list[bool | str] = []

    async def draw() -> None:
        stream = Stream([Begun("m:0"), Placed("1", True), Failed(WorkerDied("it did"))])
        on_ray: Any = engine.RayServe(Settings(), {"d": Handle([stream])}, {"d": ["m"]})  # type: ignore[dict-item]
        on_ray.on_place = lambda id, taken: told.append(taken)
        on_ray.on_device = lambda id, device: told.append(device)
        async for _ in on_ray.submit(ModelConfig(name="m", model="x"), WANTED):
            pass

    asyncio.run(draw())
    assert told == [False, "m:0", True], told


def a_look_that_fails_is_not_the_last() -> None:
    state = ReplicaState("one", DeviceState("m:0", True, "", 0, replace(EngineStats(), restarts=3), {}))

    def broken() -> list[Any]:
        raise ZeroDivisionError

    def no_answer() -> list[Any]:
        return [lost.RayActorError(error_msg="out of reach")]

    async def watch() -> None:
        looked = asyncio.Event()
        restarts: list[int] = []

        def count(_: int) -> None:
            restarts.append(on_ray.stats.restarts)
            if len(restarts) == 6:
                looked.set()

        def last() -> list[Any]:
            return [state]

        looks = [broken, last, no_answer, last, list, *[last] * 100]
        on_ray = engine.RayServe(Settings(), {"m": Handle(looks=looks)}, {"m": ["m"]})  # type: ignore[dict-item]
        await on_ray.start()
        restarts.clear()
        on_ray.on_places = count
        await asyncio.wait_for(looked.wait(), 60)
        await on_ray.stop()
        assert restarts == [0, 3, 3, 3, 3, 3], restarts

    engine.EVERY_S = 0.0
    asyncio.run(watch())


def a_replica_has_room_for_all_that_the_queue_sends(folder: str) -> None:
    """Of two models with two replicas each, all places but those of its other replica may have one's pictures."""
    ingress: Any = app({"models": folder, "data": folder, "device": "cpu", "max_active": 8, "max_replicas": 2})
    _, models, _ = ingress._bound_deployment.init_args
    rooms = {name: each._bound_deployment.max_ongoing_requests for name, each in models.items()}
    others = 2 * (len(rooms) - 1)
    assert len(rooms) >= 2, rooms
    assert set(rooms.values()) == {8 * (1 + others) + 4 * (1 + others)}, rooms


def models_of_a_group_have_one_deployment(folder: str) -> None:
    arguments = {"models": folder, "data": folder, "device": "cpu", "groups": "{g: [one, two]}"}
    ingress: Any = app(arguments)
    _, handles, models = ingress._bound_deployment.init_args
    assert models["g"] == ["one", "two"], models
    assert set(models) == set(handles) == {"g", "sfumato-tiny"}, models

    loaded = ReplicaState("r", DeviceState("g:0", True, "", 0, EngineStats(), {"two": ModelStatus("ready")}))
    ordered: list[object] = []

    class Group(Handle):
        def broadcast(self, method: str, *of: object) -> Any:
            ordered.extend(of)
            return Handle(looks=[lambda: [Ordered("")]]).broadcast() if of else super().broadcast()

    async def watch() -> None:
        known, pin, unload = asyncio.Event(), Pin("two", True), Unload("one")
        looks: list[Any] = [list, *[lambda: [loaded]] * 100]
        on_ray = engine.RayServe(Settings(), {"g": Group(looks=looks)}, {"g": ["one", "two"]})  # type: ignore[dict-item]
        on_ray.order(pin)
        await on_ray.start()
        on_ray.on_places = lambda places: known.set() if len(ordered) == 2 else None
        await asyncio.wait_for(known.wait(), 60)  # the replica that has come was told of the pin, too
        assert [on_ray.status(model).state for model in ("one", "two", "none")] == ["unloaded", "ready", "unloaded"]
        assert [device.name for device in on_ray.devices] == ["g:0"]
        for command in (unload, Unload("none")):
            await on_ray.carry_out(command)
        await on_ray.stop()
        assert ordered == [pin, pin, unload], ordered

    asyncio.run(watch())


if __name__ == "__main__":
    engine.PAUSES_S = (0.0, 0.1, 0.1, 0.2, 0.2)
    no_worker_is_told_as_such()
    what_a_replica_has_begins_when_its_worker_says_so()
    a_look_that_fails_is_not_the_last()
    a_replica_has_room_for_all_that_the_queue_sends(sys.argv[1])
    models_of_a_group_have_one_deployment(sys.argv[1])
