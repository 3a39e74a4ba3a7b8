"""The application on a socket: uvicorn with limits on connections and time, and an orderly end of its requests."""

from __future__ import annotations

import asyncio
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

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT and not self.hurried:
            self.hurried = True  # uvicorn handles a third one by dropping everything
        else:
            super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
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
        end = asyncio.get_running_loop().time() + self._grace_s
        while not self.hurried and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.1)  # as often as uvicorn checks; a signal handler cannot set an asyncio event
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
