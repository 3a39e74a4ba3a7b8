"""A replica of a deployment: a supervisor with its worker, which draws as it does without Ray.

The death of the worker is the affair of the supervisor, as ever: the next one draws the same pictures. A replica whose
worker does not start, or that does not answer, is unhealthy, and Ray replaces it, perhaps on another node.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from ray import serve

from sfumato import logs
from sfumato.config import ModelConfig
from sfumato.core import Generation, Step
from sfumato.engine.protocol import Load, Ordered, Pin, Placed, Unload
from sfumato.process.devices import work_of
from sfumato.process.supervisor import Supervisor
from sfumato.ray_serve.messages import Begun, Item, ReplicaState
from sfumato.settings import Settings


class Replica:
    """Draws the pictures of one model, or of a group of them, which share its memory as in one process."""

    async def __init__(self, settings: Settings, name: str) -> None:  # type: ignore[misc]  # Ray awaits it
        logs.configure(settings)
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        self._supervisor = Supervisor(settings, name=f"{name}:{context.rank.rank}")
        self._supervisor.on_place = self._place
        self._items: dict[str, asyncio.Queue[Item | None]] = {}
        """Id of a generation → what is sent next, and at its end None."""
        self._steps_left: dict[str, int] = {}
        await self._supervisor.start()

    async def draw(self, config: ModelConfig, generation: Generation, deaths: int) -> AsyncGenerator[Item, None]:
        """The stream of a picture. `deaths`: of workers elsewhere, that it may have caused. Closing it cancels."""
        id = generation.id
        queue = self._items[id] = asyncio.Queue[Item | None]()
        self._steps_left[id], _ = work_of(config, generation, self._supervisor.status(config.name).info)
        drawing = asyncio.create_task(self._draw(config, generation, deaths, queue))
        try:
            if generation.loras:  # where these are in memory the next one with them is sent
                await self.adapters(adapters_key(generation))
            yield Begun(self._supervisor.devices[0].name)
            while (item := await queue.get()) is not None:
                yield item
        finally:
            del self._items[id], self._steps_left[id]
            drawing.cancel()
            await asyncio.wait([drawing])

    async def _draw(
        self, config: ModelConfig, generation: Generation, deaths: int, queue: asyncio.Queue[Item | None]
    ) -> None:
        try:
            async with aclosing(self._supervisor.submit(config, generation, deaths)) as events:
                async for event in events:
                    if isinstance(event, Step):
                        self._steps_left[generation.id] = event.total - event.step
                    queue.put_nowait(event)
        finally:
            queue.put_nowait(None)

    def _place(self, id: str, taken: bool) -> None:
        if queue := self._items.get(id):
            queue.put_nowait(Placed(id, taken))

    @serve.multiplexed(max_num_models_per_replica=8)  # type: ignore[untyped-decorator]
    async def adapters(self, key: str) -> str:
        """Tells Ray that this replica has them; what they are in memory is the worker's affair."""
        return key

    async def carry_out(self, command: Load | Unload | Pin) -> Ordered:
        """As `Engine.carry_out`; a pin is carried out at once."""
        if isinstance(command, Pin):
            self._supervisor.order(command)
            return Ordered("")
        return await self._supervisor.carry_out(command)

    async def state(self) -> ReplicaState:
        return ReplicaState(self._id, self._supervisor.devices[0])

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray for the deployment's autoscaling policy."""
        return {"steps": sum(self._steps_left.values()), "pictures": len(self._steps_left)}

    async def check_health(self) -> None:
        """Called by Ray, which replaces a replica for which this raises, or does not return."""
        if problem := self._supervisor.problem:
            raise RuntimeError(f"the worker does not start: {problem}")

    async def __del__(self) -> None:
        """Called by Ray when a replica is stopped and has no requests."""
        await self._supervisor.stop()


def adapters_key(generation: Generation) -> str:
    """What Ray calls the LoRAs of a request together."""
    return ",".join(sorted(lora.sha256[:12] or lora.name for lora in generation.loras))
