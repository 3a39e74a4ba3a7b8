"""Servers of picture URLs on the loopback interface, and names that never resolve."""

from __future__ import annotations

import asyncio
import base64
import http.server
import socket
import threading
from collections.abc import Callable
from typing import Any

from sfumato.pictures.fetch import PictureFetcher
from support.serving import Server

PICTURE = base64.b64decode(Server.png_data_uri().partition(",")[2])


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """Answers as `answer` does."""

    answer: Callable[[Elsewhere], None]
    seen: list[dict[str, str]]

    def do_GET(self) -> None:
        self.seen.append({name.lower(): value for name, value in self.headers.items()})
        try:
            type(self).answer(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # it has heard enough

    def say(self, status: int = 200, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


class Site:
    """A server on the loopback interface whose answers a function writes; `seen` are the headers it was sent."""

    def __init__(self, answer: Callable[[Elsewhere], None]) -> None:
        self.seen: list[dict[str, str]] = []
        handler = type("Answering", (Elsewhere,), {"answer": answer, "seen": self.seen})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://127.0.0.1:{self._server.server_port}/picture"

    def __enter__(self) -> Site:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fetched(self, take: Callable[[int], None] = lambda count: None) -> bytes:
        async def run() -> bytes:
            fetcher = PictureFetcher(["127.0.0.1"])
            try:
                return await fetcher.get(self.url, "image", take)
            finally:
                assert len(fetcher._client.cookies.jar) == 0
                await fetcher.close()

        return asyncio.run(run())


class DeadNames:
    """`socket.getaddrinfo`, which never answers for names that begin with `dead` until it is let go."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.asked = 0

    def __call__(self, host: str, port: int, **more: Any) -> list[tuple[Any, ...]]:
        if host.startswith("dead"):
            self.asked += 1
            self.over.wait(120)
            raise socket.gaierror("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]
