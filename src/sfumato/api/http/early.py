"""Answer `/healthz` while the server imports its libraries, which takes longer than everything else at its start.

A thread accepts connections on the server's socket, with the standard library alone. Every other request is answered
with 503 and `Retry-After`; a browser asks again by itself. Then the application gets the socket; connections that have
not been accepted are its own.
"""

from __future__ import annotations

import json
import selectors
import socket
import threading
import time
from contextlib import suppress

from sfumato import __version__

PATIENCE_S = 0.5
"""Seconds for a client to send its request, and as many to read the answer."""

LONGEST_HEAD = 8192
"""Maximum bytes of a request's head."""

BACKLOG = 128

STARTING = {"error": {"message": "the server is starting; try again in a second", "type": "server_error", "param": None,
                      "code": "starting"}}  # fmt: skip


class EarlyAnswers:
    """A context: inside it `socket` is answered until `hand_over` is called."""

    def __init__(self, host: str, port: int) -> None:
        """Nothing is answered if the address cannot be bound; the server will report that."""
        self.socket: socket.socket | None = None
        self._ended, self._end = socket.socketpair()
        bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host, port))
            bound.listen(BACKLOG)
        except OSError:
            bound.close()
            return
        self.socket = bound
        self._thread = threading.Thread(target=self._run, args=(bound,), name="sfumato-early", daemon=True)
        self._thread.start()

    def __enter__(self) -> EarlyAnswers:
        return self

    def __exit__(self, *error: object) -> None:
        if bound := self.hand_over():
            bound.close()
        self._ended.close()
        self._end.close()

    def hand_over(self) -> socket.socket | None:
        """Stop answering; the listening socket, once, or None if it could not be bound."""
        bound, self.socket = self.socket, None
        if bound:
            self._end.send(b"x")
            self._thread.join()
            bound.setblocking(True)
        return bound

    def _run(self, bound: socket.socket) -> None:
        bound.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(bound, selectors.EVENT_READ)
            selector.register(self._ended, selectors.EVENT_READ)
            while not any(key.fileobj is self._ended for key, _ in selector.select()):
                with suppress(OSError):  # a client that is gone
                    client, _ = bound.accept()
                    with client:
                        client.sendall(answer(_head(client)))


def answer(head: bytes) -> bytes:
    """The response to a request with this head; empty if it is not one."""
    method, _, rest = head.split(b"\r\n")[0].partition(b" ")
    path = rest.split(b" ")[0].split(b"?")[0]
    if not head.endswith(b"\r\n\r\n") or not path.startswith(b"/"):
        return b""
    alive = path == b"/healthz" and method in (b"GET", b"HEAD")
    body = json.dumps({"status": "ok", "version": __version__} if alive else STARTING).encode()
    lines = [
        "HTTP/1.1 200 OK" if alive else "HTTP/1.1 503 Service Unavailable",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        *(() if alive else ("retry-after: 1", "refresh: 1", "x-sfumato-starting: 1")),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + (b"" if method == b"HEAD" else body)


def _head(client: socket.socket) -> bytes:
    """Empty if it has not come in time: one that sends byte by byte must not hold up the server's start."""
    head, deadline = b"", time.monotonic() + PATIENCE_S
    while b"\r\n\r\n" not in head and len(head) < LONGEST_HEAD and (left := deadline - time.monotonic()) > 0:
        client.settimeout(left)
        if not (more := client.recv(LONGEST_HEAD)):
            break
        head += more
    client.settimeout(PATIENCE_S)
    return head[: head.find(b"\r\n\r\n") + 4]
