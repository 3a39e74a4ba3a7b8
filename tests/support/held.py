"""A request that is drawn for long, for what happens meanwhile; it always ends with its block."""

from __future__ import annotations

import http.client
import json
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import httpx

from support.answerable import within
from support.serving import TIMEOUT_S, Server

LONG: dict[str, Any] = {"prompt": "a cat", "steps": 900, "size": "512x512"}
"""Takes many minutes with the built-in model: however slow whoever looks at it is, it still goes on."""

GENERATIONS = "/v1/images/generations"


class Held:
    """A request in a thread of its own: from the start of the block it is queued or drawn, at its end it is cancelled.

    A test that fails leaves the server, which others use too, as it was.
    """

    def __init__(
        self,
        server: Server,
        body: Mapping[str, Any] = LONG,
        path: str = GENERATIONS,
        *,
        id: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.id = id or uuid.uuid4().hex
        self._server, self._body, self._path = server, body, path
        self._headers = dict(headers or {})
        self._answers: list[httpx.Response] = []
        self._thread = threading.Thread(target=self._send)

    def __enter__(self) -> Held:
        self._thread.start()
        try:
            # Its id is known before its body was read; its model once it stands in the queue.
            self.until(lambda seen: seen.get("model"))
        except BaseException:
            self.cancel()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()

    @property
    def answered(self) -> bool:
        return bool(self._answers)

    def progress(self, method: str = "GET") -> dict[str, Any]:
        """As the server tells it; an error's body before the id is known."""
        answer = self._server.client.request(method, f"/v1/images/progress/{self.id}", headers=self._headers)
        return dict(answer.json())

    def until(self, true: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Asks until its progress is so, be it that of a request that has ended."""
        while True:
            ended = not self._thread.is_alive()
            if true(seen := self.progress()):
                return seen
            assert not ended, [answer.text for answer in self._answers]
            time.sleep(0.01)

    def drawing(self, steps: int = 1) -> dict[str, Any]:
        """Its progress once so many steps are done."""
        return self.until(lambda seen: seen.get("step", 0) >= steps)

    def answer(self) -> httpx.Response:
        self._thread.join(TIMEOUT_S)
        assert self._answers, f"not answered within {TIMEOUT_S} s"
        return self._answers[0]

    def cancel(self) -> httpx.Response:
        """Its answer, which is 499 unless it has ended before."""
        if not self.answered:
            self.progress("DELETE")  # answered once the work has ended
        return self.answer()

    def _send(self) -> None:
        with httpx.Client(base_url=self._server.url, timeout=TIMEOUT_S) as client:
            headers = self._headers | {"x-request-id": self.id}
            self._answers.append(client.post(self._path, json=dict(self._body), headers=headers))


def left(server: Server, body: Mapping[str, Any] = LONG, path: str = GENERATIONS) -> str:
    """The id of a request whose client has hung up without a word, while it was drawn."""
    id = uuid.uuid4().hex
    client = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=TIMEOUT_S)
    with closing(client):
        client.request("POST", path, json.dumps(dict(body)), {"content-type": "application/json", "x-request-id": id})

        def drawing() -> bool:
            seen = server.client.get(f"/v1/images/progress/{id}").json()
            assert seen.get("status") in (None, "queued", "drawing"), seen
            return bool(seen.get("step"))

        within(TIMEOUT_S, drawing)
    return id
