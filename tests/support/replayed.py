"""A generation whose worker is killed while it is drawn."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import aclosing

from sfumato.config import ModelConfig
from sfumato.core import Done, Event, Generation, Step
from sfumato.process.supervisor import Supervisor
from sfumato.settings import Settings


async def _events(supervisor: Supervisor, config: ModelConfig, generation: Generation, *, kill: bool) -> list[Event]:
    seen: list[Event] = []
    async with aclosing(supervisor.submit(config, generation)) as events:
        async for event in events:
            seen.append(event)
            if kill and len(seen) == 2:
                assert supervisor.pid
                os.kill(supervisor.pid, signal.SIGKILL)
    return seen


def same_after_a_kill(config: ModelConfig, generation: Generation) -> None:
    """It begins again in another worker, and its file is the same."""

    async def run() -> None:
        supervisor = Supervisor(Settings(device="cpu", log_level="error"))
        await supervisor.start()
        *_, undisturbed = await _events(supervisor, config, generation, kill=False)
        *steps, done = await _events(supervisor, config, generation, kill=True)
        await supervisor.stop()
        assert isinstance(done, Done) and isinstance(undisturbed, Done)
        assert done.file == undisturbed.file
        assert steps.count(Step(1, generation.sampling.steps or 0)) == 2  # it began again

    asyncio.run(run())
