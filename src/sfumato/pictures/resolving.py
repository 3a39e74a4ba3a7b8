"""Names of hosts, looked up so that those which never resolve hold up nobody else.

The system's lookup (it reads /etc/hosts, and what else the operator has set) cannot be stopped and may take
half a minute. Each runs in a thread of its own, of which there are only so many; whoever asks waits for a
while, or until the client has gone.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

Lookup: TypeAlias = Callable[..., list[tuple[Any, ...]]]
"""As `socket.getaddrinfo`."""

MAX_LOOKUPS = 32
"""At a time, those included for which nobody waits any more."""

WAIT_S = 5.0
"""For a name, and for a thread to look it up in."""


class Unresolved(Exception):
    """Why a name has no address."""


class Resolver:
    """The address of a name. `lookup` is `socket.getaddrinfo` unless it is given; it may block for ever."""

    def __init__(self, lookup: Lookup | None = None, wait_s: float = WAIT_S, lookups: int = MAX_LOOKUPS) -> None:
        self._lookup = lookup
        self._wait_s = wait_s
        self._threads = asyncio.Semaphore(lookups)

    async def address(self, host: str, port: int) -> str:
        """The first. Raises Unresolved."""
        name = repr(host[:100])
        try:
            async with asyncio.timeout(self._wait_s):
                await self._threads.acquire()
                return await self._looked_up(host, port)
        except TimeoutError:
            raise Unresolved(f"the name {name} was not resolved within {self._wait_s:g} s") from None
        except (OSError, UnicodeError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise Unresolved(f"the name {name} does not resolve ({reason})") from None

    async def _looked_up(self, host: str, port: int) -> str:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str] = loop.create_future()

        def settle(address: str | None, error: BaseException | None) -> None:
            self._threads.release()
            if answer.done():  # nobody waits any more
                return
            if error:
                answer.set_exception(error)
            else:
                answer.set_result(address or "")

        def look_up() -> None:
            lookup = self._lookup or socket.getaddrinfo
            address, failed = None, None
            try:
                address = str(lookup(host, port, type=socket.SOCK_STREAM)[0][4][0])
            except Exception as error:  # it is raised to whoever asked
                failed = error
            try:
                loop.call_soon_threadsafe(settle, address, failed)
            except RuntimeError:
                return  # the loop is closed: the server has ended meanwhile

        # A daemon: a name that does not resolve must not keep the process from ending.
        try:
            threading.Thread(target=look_up, name="resolve", daemon=True).start()
        except RuntimeError as error:  # the machine has no more
            self._threads.release()
            raise OSError(str(error)) from None
        return await answer
