"""Resolve host names so that one that never resolves does not block other requests.

The system's lookup (which respects /etc/hosts and the operator's configuration) cannot be cancelled and may take
half a minute. Each lookup runs in its own thread, of a limited number; the caller waits for a limited time, or
until its client disconnects.
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
"""At the same time, including lookups whose caller has given up."""

WAIT_S = 5.0
"""Maximum wait for a name, including the wait for a thread."""


class Unresolved(Exception):
    """Why a name has no address."""


class Resolver:
    """Resolves names. `lookup` is `socket.getaddrinfo` by default; it may block forever."""

    def __init__(self, lookup: Lookup | None = None, wait_s: float = WAIT_S, lookups: int = MAX_LOOKUPS) -> None:
        self._lookup = lookup
        self._wait_s = wait_s
        self._threads = asyncio.Semaphore(lookups)

    async def address(self, host: str, port: int) -> str:
        """The first address. Raises Unresolved."""
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
            if answer.done():  # the caller has given up
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
            except Exception as error:  # it is raised in the caller
                failed = error
            try:
                loop.call_soon_threadsafe(settle, address, failed)
            except RuntimeError:
                return  # the event loop is closed: the server has stopped

        # A daemon thread: a name that does not resolve must not keep the process from exiting.
        try:
            threading.Thread(target=look_up, name="resolve", daemon=True).start()
        except RuntimeError as error:  # no more threads available
            self._threads.release()
            raise OSError(str(error)) from None
        return await answer
