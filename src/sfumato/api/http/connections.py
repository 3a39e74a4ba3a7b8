"""Connection limits of the server: how many, how slow, and which one is closed for a new one.

uvicorn keeps a connection as long as its client likes, and accepts until no file descriptor is left. Here a client
that stalls for `patience` seconds is disconnected, and at the limit the connection idle longest is closed, so that a
new client always gets in.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import socket
import struct
import sys
import time
import uuid
from typing import Any, Literal, TypeAlias

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from sfumato.api.http import errors
from sfumato.errors import InvalidRequest, RequestTimeout, SfumatoError, TooManyConnections

try:
    import fcntl
    import resource
    import termios

    POSIX = True
except ImportError:  # Windows has no such limits
    POSIX = False

ACCEPTED_AT_ONCE = 4
"""Connections that asyncio accepts before the first of them is counted."""

WAITING_AT_ONCE = 2048
"""Backlog: connections that the system holds until they are accepted."""

READ_AT_ONCE = 2**14
"""In bytes: each read is parsed in one go, which blocks all other clients."""

LEAST_RATE = 1024
"""In bytes per second: slower clients count as stalled."""

NEW_CONNECTION_S = 1.0
"""Seconds that a new connection has to send its request before it counts as idle."""

RESERVED_DESCRIPTORS = 32
"""File descriptors reserved for other uses than connections; at most an eighth of all."""

MAX_TINY_CHUNK_BYTES, TINY_CHUNK = 2**18, 32
"""Maximum bytes of a chunked body in which a line ends more often than every `TINY_CHUNK` bytes: h11 needs some
microseconds per chunk, however small."""

ConnectionState: TypeAlias = Literal["idle", "receiving", "answering"]


def raise_descriptor_limit() -> None:
    """Raise it to the maximum the system allows this process."""
    if POSIX:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # macOS reports "unlimited" but does not allow it
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Connections:
    """The connections of one server, by state and in the order they entered it."""

    def __init__(self, limit: int, patience: float) -> None:
        self._limit = limit
        self.patience = patience
        self.by_state: dict[ConnectionState, dict[Connection, None]] = {"idle": {}, "receiving": {}, "answering": {}}

    def __len__(self) -> int:
        return sum(map(len, self.by_state.values()))

    @property
    def limit(self) -> int:
        """The setting, or what file descriptors allow; their limit may change at run time."""
        if not POSIX:
            return self._limit
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY:
            return self._limit
        return max(1, min(self._limit, soft - max(RESERVED_DESCRIPTORS, soft // 8)))

    def opened(self, new: Connection) -> None:
        """Register a new connection; if there are too many, close another one, or this one."""
        self.by_state["idle"][new] = None
        if len(self) <= self.limit:
            return
        idle, receiving = self._longest("idle", new), self._longest("receiving", new)
        fresh = idle is None or time.monotonic() - idle.since < NEW_CONNECTION_S
        victim = receiving if fresh and receiving is not None else idle
        if victim is not None:
            victim.transport.abort()
            return
        # Refused after its request: a client that is closed earlier might not read the reason.
        new.surplus = TooManyConnections(f"{len(self) - 1} connections are open; try again later")

    def _longest(self, state: ConnectionState, new: Connection) -> Connection | None:
        return next(
            (each for each in self.by_state[state] if each is not new and not each.transport.is_closing()), None
        )

    async def sweep(self) -> None:
        """Disconnect stalled clients, until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self.patience / 4))
            now = time.monotonic()
            for connections in self.by_state.values():
                for connection in list(connections):
                    connection.check(now)


class Connection(H11Protocol):
    """uvicorn's connection, with time limits."""

    state: ConnectionState = "idle"
    surplus: TooManyConnections | None = None
    """Why it is refused."""

    def __init__(self, *args: Any, connections: Connections, **options: Any) -> None:
        super().__init__(*args, **options)
        self._all = connections
        self._restart_clock()

    def _restart_clock(self) -> None:
        """Restart the clock for a new state."""
        self.since = self._checked_at = time.monotonic()
        self._idle_s = 0.0
        """Seconds spent waiting for the client to send."""
        self._received = 0
        self._tiny_chunk_bytes = 0
        self._pending, self._read_by_client, self._stalled_s = 0, 0, 0.0
        """Bytes not yet read by the client, bytes it has read, and seconds with unread bytes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if hasattr(transport, "max_size"):
            transport.max_size = READ_AT_ONCE
        _send_at_once(transport)
        super().connection_made(transport)
        self._all.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.by_state[self.state].pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.surplus is not None:
            self.refuse(self.surplus)
            return
        self._received += len(data)
        if self.state == "receiving":
            self._tiny_chunk_bytes += data.count(b"\n") * TINY_CHUNK - len(data)
            if self._tiny_chunk_bytes > MAX_TINY_CHUNK_BYTES and self._chunked():
                self.refuse(
                    InvalidRequest("the body has too many tiny chunks; send larger chunks, or a content-length")
                )
                return
            self._tiny_chunk_bytes = max(0, self._tiny_chunk_bytes)
        if not self.transport.is_closing():
            super().data_received(data)
            self._update_state()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_state()

    def send_400_response(self, msg: str) -> None:
        """Called if h11 could not parse a request."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        self.refuse(InvalidRequest(f"not a valid HTTP request: {str(error)[:200]}"), status)

    def refuse(self, error: SfumatoError, status: int = 0) -> None:
        """Send an error response, unless a response has begun, and close."""
        answer = errors.response(error)
        status = status or error.status
        head = h11.Response(
            status_code=status,
            headers=[*answer.raw_headers, (b"connection", b"close"), (b"x-request-id", self._request_id().encode())],
            reason=http.HTTPStatus(status).phrase.encode(),
        )
        with contextlib.suppress(h11.LocalProtocolError):
            for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self._unset_keepalive_if_required()
        self.transport.close()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _request_id(self) -> str:
        """Of the request being received, if it has got one, else a new one."""
        pending = self.cycle is not None and not self.cycle.response_complete
        known: str | None = self.cycle.scope.get("state", {}).get("request_id") if pending and self.cycle else None
        return known or uuid.uuid4().hex

    def check(self, now: float) -> None:
        """Disconnect if the client has stalled for too long."""
        passed, self._checked_at = now - self._checked_at, now
        patience = self._all.patience
        if self._is_stalled(passed):
            self.transport.abort()
        elif self.transport.is_closing() or self.state == "answering" or self.flow.read_paused:
            return
        else:
            self._idle_s += passed
            answered = self.cycle is not None and self.cycle.response_complete
            more = 0 if self.state == "idle" or answered else self._received / LEAST_RATE
            if self._idle_s > patience + more:
                self._end_waiting(patience)

    def _end_waiting(self, patience: float) -> None:
        begun = self.state == "receiving" or bool(self._received)
        if begun:
            self.refuse(RequestTimeout(f"the request did not arrive within {patience:g} s (the setting patience_s)"))
        else:
            self.transport.close()

    def _is_stalled(self, passed: float) -> bool:
        """Whether the client does not read its response."""
        pending = self.transport.get_write_buffer_size() + _unacknowledged(self.transport)
        self._read_by_client += max(0, self._pending - pending)
        self._pending = pending
        if not pending:
            self._read_by_client, self._stalled_s = 0, 0.0
            return False
        self._stalled_s += passed
        return self._stalled_s > self._all.patience + self._read_by_client / LEAST_RATE

    def _update_state(self) -> None:
        """Update the state if it changed."""
        cycle = self.cycle
        if self.conn.their_state is h11.SEND_BODY:
            state: ConnectionState = "receiving"
        else:
            state = "idle" if cycle is None or cycle.response_complete else "answering"
        if state != self.state:
            if self in self._all.by_state[self.state]:  # else the connection is lost
                del self._all.by_state[self.state][self]
                self._all.by_state[state][self] = None
            self.state = state
            self._restart_clock()

    def _chunked(self) -> bool:
        return any(name == b"transfer-encoding" for name, _ in self.headers or ())


def _send_at_once(transport: asyncio.Transport) -> None:
    """Set TCP_NODELAY: otherwise the second part of a response waits 40 ms for the acknowledgement of the first.

    asyncio does so itself, but not for sockets created without naming the protocol, like uvicorn's.
    """
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _unacknowledged(transport: asyncio.Transport) -> int:
    """Bytes sent but not yet acknowledged by the client."""
    sock = transport.get_extra_info("socket")
    if sock is None or not POSIX or not sys.platform.startswith("linux"):
        return 0
    try:
        (count,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))
    except OSError:
        return 0
    return int(count)
