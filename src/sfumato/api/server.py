"""The application on a socket: uvicorn with limits on connections and time, and an orderly end of its requests."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn

from sfumato import __version__, allocator
from sfumato.api.app import create_app
from sfumato.api.http.connections import (
    ACCEPTED_AT_ONCE,
    WAITING_AT_ONCE,
    Connection,
    Connections,
    raise_descriptor_limit,
)
from sfumato.api.http.early import EarlyAnswers
from sfumato.api.http.shutdown import ActiveRequests
from sfumato.engine.protocol import Engine
from sfumato.errors import SfumatoError
from sfumato.pictures.stores import store_of
from sfumato.serving.catalog import Catalog
from sfumato.serving.service import Service
from sfumato.settings import Settings

log = logging.getLogger("sfumato")

ENDING_S = 15
"""Seconds after the grace time for answering the remaining requests."""
TICK_S = 1.0
"""Seconds for which uvicorn's header `date` may stand."""
INTERRUPTED = 130
"""Exit code after a second Ctrl-C, as usual for programs ended by Ctrl-C."""


class Server(uvicorn.Server):
    """uvicorn with `Connections`; we end its requests after the grace time, or on a second Ctrl-C."""

    def __init__(
        self, config: uvicorn.Config, connections: Connections, running: ActiveRequests, grace_s: float
    ) -> None:
        super().__init__(config)
        self.hurried = False
        self._connections = connections
        self._running = running
        self._grace_s = grace_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping, self._hurry = asyncio.Event(), asyncio.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT and not self.hurried:
            self.hurried = True  # uvicorn handles a third one by dropping everything
        else:
            super().handle_exit(sig, frame)
        if self._loop:  # as asyncio's own handler of SIGINT wakes it
            self._loop.call_soon_threadsafe((self._hurry if self.hurried else self._stopping).set)

    async def main_loop(self) -> None:
        """Until a signal. uvicorn looks for it ten times a second, also while nothing happens."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._stopping.wait()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        # asyncio uses one number for connections accepted at once and for the backlog.
        for sock in sockets or ():
            sock.listen(WAITING_AT_ONCE)
        self._sweeper = asyncio.create_task(self._connections.sweep())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end(self) -> None:
        self._running.begin_stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace_s):
                await self._hurry.wait()
        if count := self._running.end():
            log.warning("the server is stopping; %d running requests are answered with 503", count)


def run(settings: Settings, engine: Engine, early: EarlyAnswers) -> None:
    """Serve until SIGTERM or Ctrl-C; running requests are finished first, as far as `grace_s` allows.

    `early` has answered on the server's socket so far.

    A second Ctrl-C ends them at once, and the process exits with code 130.

    Raises SfumatoError naming the setting at fault.
    """
    allocator.return_large_blocks()
    raise_descriptor_limit()
    catalog = Catalog.of(settings)
    for problem in catalog.problems():
        log.warning("%s", problem)
    running = ActiveRequests()
    try:
        application = create_app(Service(catalog, engine, settings), store_of(settings), running)
    except ValueError as error:
        raise SfumatoError(str(error)) from None
    connections = Connections(settings.max_connections, settings.patience_s)
    config = uvicorn.Config(
        application,
        http=functools.partial(Connection, connections=connections),  # type: ignore[arg-type]
        ws="none",
        backlog=ACCEPTED_AT_ONCE,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # `http.middleware` writes its own, with the caller and without the query string
        proxy_headers=False,  # `http.urls` handles them
        timeout_graceful_shutdown=settings.grace_s + ENDING_S,
    )
    sock = early.hand_over() or config.bind_socket()  # which reports why it cannot be bound
    sock.listen(WAITING_AT_ONCE)  # clients may connect as soon as the line below is logged
    host, port = sock.getsockname()[:2]
    names = ", ".join(model.name for model in catalog.all())
    log.info("Sfumato %s on http://%s:%d with %s", __version__, host, port, names)
    # uvicorn raises the signal that stopped it again at its end, for earlier handlers.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server = Server(config, connections, running, settings.grace_s)
    server.run(sockets=[sock])
    if server.hurried:
        sys.exit(INTERRUPTED)
