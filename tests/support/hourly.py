"""The server's loop without an application; it looks around once an hour, and says so."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn

from sfumato.api import server
from sfumato.api.http.connections import Connections
from sfumato.api.http.shutdown import ActiveRequests


class Told(server.Server):
    async def on_tick(self, counter: int) -> bool:
        print("looked", flush=True)
        return await super().on_tick(counter)


async def nothing(scope: Any, receive: Any, send: Any) -> None: ...


async def main() -> None:
    config = uvicorn.Config(nothing, port=0, lifespan="off", log_config=None)
    running = Told(config, Connections(10, 10.0), ActiveRequests(), grace_s=3600.0)
    with config.bind_socket() as sock:
        await running.serve([sock])


if __name__ == "__main__":
    server.TICK_S = 3600.0
    asyncio.run(main())
