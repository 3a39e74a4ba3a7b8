"""Who is told by webhooks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import openai
import pytest

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # of the scheme's own tests


class Receiver:
    """An HTTP server that answers with the given statuses, then 204. `messages`: headers and body of each request."""

    def __init__(self, *statuses: int) -> None:
        self.messages: list[tuple[dict[str, str], bytes]] = []
        self.statuses = list(statuses)
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status = receiver.statuses.pop(0) if receiver.statuses else 204
                receiver.messages.append(({name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(status)
                self.send_header("location", "http://127.0.0.1:1/")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://localhost:{self._server.server_port}/told"

    @contextmanager
    def running(self) -> Iterator[Receiver]:
        thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def event(self, index: int = -1) -> dict[str, Any]:
        """A message, once its signature was found right by the OpenAI SDK, which verifies by the same scheme."""
        headers, body = self.messages[index]
        with openai.OpenAI(api_key="unused", webhook_secret=SECRET) as client:
            client.webhooks.verify_signature(body, headers)
            with pytest.raises(openai.InvalidWebhookSignatureError):
                client.webhooks.verify_signature(body + b" ", headers)
        event = dict(json.loads(body))
        assert event["id"] == headers["webhook-id"]
        return event
