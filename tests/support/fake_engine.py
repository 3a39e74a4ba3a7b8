"""An engine that draws nothing, for what stands in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from sfumato.config import ModelConfig
from sfumato.core import Done, Event, Failed, Generation, Recipe, Step
from sfumato.engine.protocol import DeviceState, OnDevice, OnPlace
from sfumato.errors import DrawError
from sfumato.sampling import Sampling
from sfumato.status import EngineStats, ModelStatus


class FakeEngine:
    """Answers each generation with its own id; `hold` keeps them open, `fail` fails the seeds in it."""

    ready: bool = True
    stats = EngineStats()
    on_place: OnPlace
    on_device: OnDevice
    on_places: Callable[[int], None]

    def __init__(self) -> None:
        self.seen: list[Generation] = []
        self.closed: list[int] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.fail: set[int] = set()
        self.arrived: asyncio.Queue[int] = asyncio.Queue()

    @property
    def devices(self) -> Sequence[DeviceState]:
        return [DeviceState("auto", self.ready, "", len(self.seen) - len(self.closed), self.stats, {})]

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def status(self, model: str) -> ModelStatus:
        return ModelStatus()

    async def submit(self, config: ModelConfig, generation: Generation) -> AsyncGenerator[Event, None]:
        self.seen.append(generation)
        self.arrived.put_nowait(generation.seed)
        self.on_place(generation.id, True)
        try:
            yield Step(1, 2)
            if generation.seed in self.fail:
                yield Failed(DrawError("drew nothing"))
                return
            await self.hold.wait()
            yield Done(str(generation.seed).encode(), recipe_of(config, generation))
        finally:
            self.closed.append(generation.seed)


def recipe_of(config: ModelConfig, asked: Generation) -> Recipe:
    return Recipe(
        model=config.name, source="", pipeline="", prompt=asked.prompt, seed=asked.seed,
        sampling=Sampling(width=1, height=1, steps=1, guidance_scale=1.0, scheduler="",
                          negative_prompt=asked.sampling.negative_prompt),
        image_sha256=(), mask_sha256=None, device="cpu", dtype="fp32",
    )  # fmt: skip
