"""One carrying out of a stored request in this process: the application answers, and any number of clients follow."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from sfumato.api.jobs.tables import Answer, StoredJob
from sfumato.serving.repeat import Repeatable

REPLAYED = (b"idempotency-replayed", b"true")
"""Header of an answer that was not drawn for this request."""


class Run:
    """Its answer, as far as it is there: a stream is passed on at once, any other answer once it is stored."""

    def __init__(self, job: StoredJob, *, promised: bool = False) -> None:
        self.job = job
        self.promised = promised
        """Whether its client was told 202, or it is carried out again: its answer is stored, whatever it is."""
        self.repeatable = Repeatable(job.secret, job.created, job.request.get("selected"))
        self.cancelled = asyncio.Event()
        self.checked = asyncio.Event()
        """Set once what is known of it without a download is no reason to refuse it, or its answer will be no other."""
        self.settled = asyncio.Event()
        """Set once it stands in the queue, or its answer will be no other."""
        self.ended = asyncio.Event()
        self.stored = True
        """Whether its answer is, or will be."""
        self.seen = False
        """Whether a client has been sent the beginning of its answer."""
        self.scope: Scope = {}
        self._start: Message | None = None
        self._chunks: list[bytes] = []
        self._news = asyncio.Event()
        self._public = False

    @property
    def answered(self) -> bool:
        """Whether the application has begun to answer."""
        return self._start is not None

    @property
    def answer(self) -> Answer:
        """What the application answered, once it has returned."""
        assert self._start is not None
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self._start["headers"]]
        return Answer(self._start["status"], headers, b"".join(self._chunks))

    def promise(self) -> None:
        """A client is told 202: also a refusal that a new try may overcome is its answer from now on."""
        self.promised = True
        self.job = replace(self.job, respond_async=True)

    def again(self) -> None:
        """What was answered so far is not the answer; nobody has seen it."""
        self._start, self._chunks, self._public = None, [], False

    async def record(self, message: Message) -> None:
        """The application's `send`."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._chunks.append(message.get("body", b""))
        if message.get("more_body", False):
            self._public = True
        self._tell()

    async def follow_submission(self) -> None:
        """Until it stands in the queue."""
        await self.repeatable.checked.wait()
        self.checked.set()
        await self.repeatable.submitted.wait()
        self.settle()

    def settle(self) -> None:
        """It stands in the queue, or its answer will be no other."""
        self.checked.set()
        self.settled.set()

    def end(self) -> None:
        """Everything that will be answered may be read."""
        self._public = True
        self.settle()
        self.ended.set()
        self._tell()

    async def follow(self, send: Send, *headers: tuple[bytes, bytes]) -> bool:
        """Send the answer, with more headers, as it comes; False if it ended here without one."""
        sent = 0
        while not self._public:
            await self._wait()
        if self._start is None:
            return False
        self.seen = True
        await send({**self._start, "headers": [*self._start["headers"], *headers]})
        while True:
            while sent < len(self._chunks):
                sent += 1
                await send({"type": "http.response.body", "body": self._chunks[sent - 1], "more_body": True})
            if self.ended.is_set():
                await send({"type": "http.response.body", "body": b""})
                return True
            await self._wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _wait(self) -> None:
        await self._news.wait()


KEPT = ("accept", "content-type", "host", "user-agent", "x-deadline-ms")
"""Request headers that are stored: those that drawing routes read. No credentials."""


def saved_scope(scope: Scope, request_id: str, selected: str | None) -> dict[str, Any]:
    """What of a request's scope it takes to carry it out again, as JSON. No credentials."""
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
    return {
        "method": scope["method"],
        "scheme": scope["scheme"],
        "path": scope["path"],
        "root_path": scope.get("root_path", ""),
        "query": scope["query_string"].decode("latin-1"),
        "headers": [[name, value] for name, value in headers if name in KEPT],
        "client": scope.get("client"),
        "server": scope.get("server"),
        "request_id": request_id,
        "selected": selected,
    }


def restored_scope(job: StoredJob, app: object, length: int) -> Scope:
    """The scope of a stored request whose body has `length` bytes."""
    saved = job.request
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in saved["headers"]]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": saved["method"],
        "scheme": saved["scheme"],
        "path": saved["path"],
        "raw_path": saved["path"].encode(),
        "root_path": saved["root_path"],
        "query_string": saved["query"].encode("latin-1"),
        "headers": [*headers, (b"content-length", str(length).encode())],
        "client": tuple(saved["client"]) if saved["client"] else None,
        "server": tuple(saved["server"]) if saved["server"] else None,
        "state": {"request_id": job.request_id, "caller": job.caller, "arrived": job.created},
        "app": app,
    }


def receiver(body: bytes) -> Receive:
    """The application's `receive`: the body, and a client that never leaves. Does not keep the body."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    return receive
