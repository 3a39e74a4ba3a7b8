"""`sfumato serve`: the application on a socket, with the engine in a child process."""

from __future__ import annotations

import functools
import logging
import signal

import uvicorn

from sfumato import __version__, allocator, logs
from sfumato.api.app import create_app
from sfumato.api.connections import (
    ACCEPTED_AT_ONCE,
    WAITING_AT_ONCE,
    Connection,
    Connections,
    Server,
    raise_descriptor_limit,
)
from sfumato.catalog import Catalog
from sfumato.engine.supervisor import Supervisor
from sfumato.errors import SfumatoError
from sfumato.service import Service
from sfumato.settings import Settings
from sfumato.store import Store

log = logging.getLogger("sfumato")

GRACE_S = 30
"""How long running requests may take after SIGTERM."""


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C; running requests are finished first.

    Raises SfumatoError that names a setting which cannot be understood.
    """
    logs.configure(settings)
    allocator.give_back_large_blocks()
    raise_descriptor_limit()
    catalog = Catalog.of(settings)
    for problem in catalog.problems():
        log.warning("%s", problem)
    try:
        application = create_app(Service(catalog, Supervisor(settings), settings), Store.of(settings))
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
        access_log=False,  # `api.requests` writes one, with the caller and without the query
        proxy_headers=False,  # `api.urls` reads them
        timeout_graceful_shutdown=GRACE_S,
    )
    sock = config.bind_socket()
    sock.listen(WAITING_AT_ONCE)  # whoever reads the line below may connect at once
    host, port = sock.getsockname()[:2]
    names = ", ".join(model.name for model in catalog.all())
    log.info("Sfumato %s on http://%s:%d with %s", __version__, host, port, names)
    # uvicorn raises the signal that stopped it once more when it is done, for whoever was there before it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    Server(config, connections).run(sockets=[sock])
