"""The engine in a child process: started by handshake, watched, restarted with back-off."""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing

from sfumato.config import ModelConfig
from sfumato.core import Event, Failed, Generation, ModelStatus
from sfumato.engine import wire
from sfumato.engine.protocol import Cancel, Command, Ready, Stop, Submit
from sfumato.engine.streams import Streams
from sfumato.errors import WorkerDied
from sfumato.settings import Settings

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""Importing torch takes seconds, on a cold disk tens of them."""
STOP_TIMEOUT_S = 30.0
MAX_BACKOFF_S = 30.0


class Supervisor:
    """Engine whose worker is a process of its own: whatever happens to it, this one lives on."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._streams = Streams()
        self._up = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._stopping = False
        self._starts_failed: WorkerDied | None = None

    @property
    def ready(self) -> bool:
        return self._up.is_set()

    @property
    def pid(self) -> int | None:
        """Process id of the worker that is up."""
        return self._process.pid if self._process and self.ready else None

    def status(self, model: str) -> ModelStatus:
        return self._streams.status(model)

    async def start(self) -> None:
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        self._stopping = True
        if self._writer:
            self._post(Stop())
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._process.wait()  # type: ignore[union-attr]
            except TimeoutError:
                log.warning("the worker did not end within %.0f s; it is killed", STOP_TIMEOUT_S)
        if self._process and self._process.returncode is None:
            self._process.kill()
        if self._keeper:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])

    async def submit(self, config: ModelConfig, generation: Generation) -> AsyncGenerator[Event, None]:
        if not self.ready and self._starts_failed:
            yield Failed(self._starts_failed)
            return
        await self._up.wait()
        self._post(Submit(config, generation))
        cancel = functools.partial(self._post, Cancel(generation.id))
        async with aclosing(self._streams.events(generation.id, cancel)) as events:
            async for event in events:
                yield event

    def _post(self, command: Command) -> None:
        if self._writer and not self._writer.is_closing():
            self._writer.write(wire.pack(command))

    async def _keep(self) -> None:
        failures = 0
        while not self._stopping:
            try:
                await self._live()
                failures = 0
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                failures += 1
                self._starts_failed = WorkerDied(f"the worker does not start ({error!r}); see the server's log")
            if self._stopping:
                break
            delay = min(MAX_BACKOFF_S, 0.25 * 2**failures)
            log.error("the worker is gone; starting another in %.2f s", delay)
            await asyncio.sleep(delay)

    async def _live(self) -> None:
        """One worker from its start to its end. Raises when it never came up."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "sfumato.engine.worker",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            writer.write(wire.pack(self._settings))
            async with asyncio.timeout(START_TIMEOUT_S):
                hello: Ready = await wire.receive_async(reader)
            log.info("worker %d is up: %s, %s", self._process.pid, hello.device, dict(hello.versions))
            self._writer, self._starts_failed = writer, None
            self._up.set()
            while True:
                try:
                    report = await wire.receive_async(reader)
                except (asyncio.IncompleteReadError, ConnectionError):
                    return
                self._streams.deliver(report)
        finally:
            self._up.clear()
            self._writer = None
            writer.close()
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
            self._streams.fail_all(
                WorkerDied("the process that computes ended while this request was running. Send it again.")
            )
