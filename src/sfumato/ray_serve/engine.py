"""The engine on Ray Serve: pictures are drawn by replicas, which Ray chooses, starts, scales and replaces.

A picture whose replica or node died is sent again, with the same seed, so it is the same picture.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

from ray import exceptions as lost
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from sfumato import logs
from sfumato.config import ModelConfig
from sfumato.core import Done, Event, Failed, Generation
from sfumato.engine.protocol import DeviceState, Load, OnDevice, OnPlace, Order, Ordered, Pin, Placed
from sfumato.engine.streams import ended
from sfumato.engine.totals import total
from sfumato.errors import ModelNotFound, NoWorker, SfumatoError, WorkerDied
from sfumato.process.devices import NEAREST
from sfumato.ray_serve.messages import Begun, ReplicaState
from sfumato.ray_serve.replica import adapters_key
from sfumato.settings import Settings
from sfumato.status import EngineStats, ModelStatus

log = logging.getLogger(__name__)

EVERY_S = 1.0
"""Seconds between two looks at the replicas."""
ANSWER_S = 10.0
"""Seconds to wait for their states; one that is stuck by then is replaced by Ray."""
MAX_ENDED = 100
"""Replicas that are gone whose counters are kept apart."""
PAUSES_S = (0.0, 0.5, 2.0, 5.0, 10.0)
"""Before a picture is sent, and before it is sent again: Ray needs a while to know that a replica is gone, or that its
worker does not start. A picture that was lost so often is failed. Deaths of a replica's worker are counted by its
supervisor."""

LOST: Final = (
    lost.RayActorError, lost.ObjectLostError, lost.WorkerCrashedError, lost.NodeDiedError, lost.RaySystemError,
)  # fmt: skip
"""What Ray raises when a replica or its node is gone."""


class RayServe:
    """Engine whose workers are replicas of deployments, each for one model or for several."""

    def __init__(
        self, settings: Settings, handles: Mapping[str, DeploymentHandle], models: Mapping[str, Sequence[str]]
    ) -> None:
        """`handles`: name of a deployment → its handle. `models`: → its models."""
        self.on_place: OnPlace = lambda id, taken: None
        self.on_device: OnDevice = lambda id, device: None
        self.on_places: Callable[[int], None] = lambda places: None
        self._places_each = settings.max_active
        self._handles, self._models = handles, models
        self._deployments = {model: name for name, each in models.items() for model in each}
        """Model → the name of its deployment."""
        self._replicas: dict[str, dict[str, DeviceState]] = {name: {} for name in handles}
        """Deployment → its replicas, by Ray's id."""
        self._ended: dict[str, EngineStats] = {}
        """Counters of replicas that are gone, by Ray's id: one that only did not answer once comes back."""
        self._ended_before = EngineStats()
        """Those of the ones before these, together."""
        self._pins: dict[str, Pin] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        self._begin(self._watch())
        self._count_places()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # Pictures.

    async def submit(self, config: ModelConfig, generation: Generation) -> AsyncGenerator[Event, None]:
        deaths = 0
        no_worker: NoWorker | None = None
        """The last loss, if it was one of these: what was promised waits for a worker."""
        for losses, pause_s in enumerate(PAUSES_S):
            # Under another id each time: a replica that is only out of reach may still draw it.
            again = replace(generation, id=f"{generation.id}-{losses}") if losses else generation
            self.on_place(generation.id, False)  # no replica may be there yet, as a model that has to be loaded
            await asyncio.sleep(pause_s)
            try:
                with _cancelling(self._drawing(config, again, deaths)) as items:
                    async for item in items:
                        match item:
                            case Begun(device):
                                no_worker = None
                                self.on_device(generation.id, device)
                            case Placed(_, taken):
                                self.on_place(generation.id, taken)
                            case Failed(NoWorker() as error):
                                deaths, no_worker = error.deaths, error
                                raise lost.RayActorError(error_msg=error.message)
                            case _:
                                yield item
                        if isinstance(item, Done | Failed):
                            return
                raise lost.RayActorError(error_msg="the stream ended without a picture")
            except LOST as error:
                log.warning("request %s lost its replica: %s", generation.id, logs.error_location(error))
            except (lost.RayError, RayServeException) as error:
                yield Failed(_error(config, error))
                return
            except SfumatoError as error:
                yield Failed(error)
                return
        yield Failed(
            no_worker or WorkerDied(f"{len(PAUSES_S)} replicas were lost while they drew this; it is not tried again")
        )

    def _drawing(self, config: ModelConfig, generation: Generation, deaths: int) -> DeploymentResponseGenerator[Any]:
        """Raises ModelNotFound."""
        key = adapters_key(generation)
        handle = self._handle(config).options(method_name="draw", stream=True, multiplexed_model_id=key)
        items: DeploymentResponseGenerator[Any] = handle.remote(config, generation, deaths)
        return items

    def _handle(self, config: ModelConfig) -> DeploymentHandle:
        if name := self._deployments.get(config.name):
            return self._handles[name]
        raise ModelNotFound(
            f"The model {config.name!r} has no deployment: its model file is newer than the application. Deploy that "
            f"again. It has: {', '.join(self._deployments)}.",
            param="model",
        )

    # Models.

    def order(self, command: Order) -> None:
        if isinstance(command, Pin):
            self._pins[command.model] = command
        self._begin(self.carry_out(command))

    async def carry_out(self, command: Order) -> Ordered:
        try:
            if isinstance(command, Load):
                ordered: Ordered = await self._handle(command.config).carry_out.remote(command)
                return ordered
            names = [name for name, models in self._models.items() if command.model in (None, *models)]
            done = [each for name in names for each in await self._of_all(name, "carry_out", command)]
        except (lost.RayError, RayServeException) as error:
            return Ordered("", error=_error(None, error))
        except SfumatoError as error:
            return Ordered("", error=error)
        in_use = tuple(dict.fromkeys(name for each in done for name in each.in_use))
        return Ordered("", in_use, next((each.error for each in done if each.error), None))

    def status(self, model: str) -> ModelStatus:
        replicas = self._replicas.get(self._deployments.get(model, ""), {}).values()
        known = [replica.models[model] for replica in replicas if model in replica.models]
        return min(known, key=lambda status: NEAREST.index(status.state), default=ModelStatus())

    # Replicas.

    async def _of_all(self, name: str, method: str, *arguments: object, timeout_s: float | None = None) -> list[Any]:
        """What each running replica answers, less those that died meanwhile. Raises TimeoutError."""
        try:
            response = self._handles[name].broadcast(method, *arguments)
            answers = await response.results_async(timeout_s=timeout_s, return_exceptions=True)
        except DeploymentUnavailableError:
            return []  # it has no replicas
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, LOST):
                log.error("%s: a replica did not carry out %s: %s", name, method, logs.error_location(answer))
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def _watch(self) -> None:
        while True:
            looks = await asyncio.gather(*(self._look(name) for name in self._handles), return_exceptions=True)
            for error in looks:
                if isinstance(error, Exception):  # without the next look nobody would know of any replica again
                    log.error("the replicas of a deployment are not known: %s", logs.error_location(error))
            self._count_places()
            await asyncio.sleep(EVERY_S)

    async def _look(self, name: str) -> None:
        before = self._replicas[name]
        try:
            states: list[ReplicaState] = await self._of_all(name, "state", timeout_s=ANSWER_S)
        except (TimeoutError, lost.RayError, RayServeException) as error:
            log.warning("%s: its replicas do not say their state (%s)", name, type(error).__name__)
            return
        now = {state.id: state.device for state in states}
        for id in before.keys() - now.keys():
            self._ended[id] = ended(before[id].stats)
        for id in now.keys() & self._ended.keys():
            del self._ended[id]
        while len(self._ended) > MAX_ENDED:
            self._ended_before = total([self._ended_before, self._ended.pop(next(iter(self._ended)))])
        self._replicas[name] = now
        if now.keys() - before.keys():
            for pin in [self._pins[model] for model in self._models[name] if model in self._pins]:
                self.order(pin)

    def _count_places(self) -> None:
        """As many pictures are drawn at a time as replicas can; one that is not there yet counts, as it will be."""
        replicas = sum(max(1, len(running)) for running in self._replicas.values())
        self.on_places(self._places_each * replicas)

    def _begin(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def ready(self) -> bool:
        """Always: Ray starts a replica when there is a request."""
        return True

    @property
    def devices(self) -> Sequence[DeviceState]:
        states = [state for replicas in self._replicas.values() for state in replicas.values()]
        return sorted(states, key=lambda state: state.name)

    @property
    def stats(self) -> EngineStats:
        return total([self._ended_before, *self._ended.values(), *(state.stats for state in self.devices)])


@contextmanager
def _cancelling(items: DeploymentResponseGenerator[Any]) -> Iterator[DeploymentResponseGenerator[Any]]:
    """Cancels the replica's task, which ends its drawing, if the block is left before the stream has ended."""
    try:
        yield items
    except BaseException:
        items.cancel()
        raise


def _error(config: ModelConfig | None, error: Exception) -> SfumatoError:
    log.error("Ray failed: %s", error)
    of = f"{config.name}: " if config else ""
    return WorkerDied(f"{of}Ray could not carry it out ({type(error).__name__}); see the server's log")
