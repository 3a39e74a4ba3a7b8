"""`sfumato serve` in a process of its own, over an engine that draws a plain square at once, or for ever.

For what happens before the engine: it starts in a second and has no torch.
"""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from PIL import Image

from sfumato.commands import serve
from sfumato.config import ModelConfig
from sfumato.core import Done, Event, Generation, Recipe, Step
from sfumato.engine.protocol import DeviceState
from sfumato.process import supervisor
from sfumato.sampling import Sampling
from sfumato.settings import Settings
from sfumato.status import EngineStats, ModelStatus
from support import serving

FOR_EVER = 1000
"""Steps of a picture that is never done."""

NOISE = "noise"
"""The prompt of a picture of some hundred kilobytes; all others are small."""


class Server(serving.Server):
    """As `serving.Server`."""

    def __init__(self, models: Path, data: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        super().__init__(models, data, *flags, env=env)
        names = [flag.removeprefix("--").replace("-", "_") for flag in flags[::2]]
        given = dict(zip(names, flags[1::2], strict=True))
        self._command = [
            sys.executable,
            "-m",
            "support.quick",
            repr({"port": "0", "models": str(models), "data": str(data)} | given),
        ]


class Square:
    """An engine: a plain square at once; a request with `FOR_EVER` steps ends when it is cancelled."""

    ready = True
    stats = EngineStats()
    devices = (DeviceState("cpu", True, "", 0, stats, {}),)

    def __init__(self, settings: Settings) -> None: ...

    def launched(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def status(self, model: str) -> ModelStatus:
        return ModelStatus()

    async def submit(self, config: ModelConfig, generation: Generation) -> AsyncGenerator[Event, None]:
        yield Step(1, 2)
        if generation.sampling.steps == FOR_EVER:
            await asyncio.Event().wait()
        noisy = generation.prompt == NOISE
        image = Image.effect_noise((512, 512), 80) if noisy else Image.new("RGB", (8, 8), "orange")
        file = io.BytesIO()
        image.save(file, "PNG")
        yield Done(file.getvalue(), _recipe(config, generation))


def _recipe(config: ModelConfig, asked: Generation) -> Recipe:
    return Recipe(
        model=config.name, source="", pipeline="", prompt=asked.prompt, seed=asked.seed,
        sampling=Sampling(width=8, height=8, steps=1, guidance_scale=1.0, scheduler="",
                          negative_prompt=asked.sampling.negative_prompt),
        image_sha256=(), mask_sha256=None, device="cpu", dtype="fp32",
    )  # fmt: skip


def main(given: dict[str, Any]) -> None:
    supervisor.Supervisor = Square  # type: ignore[assignment, misc]
    serve.serve(Settings.load(given))


if __name__ == "__main__":
    import ast

    main(ast.literal_eval(sys.argv[1]))
