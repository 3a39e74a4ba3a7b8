"""Makes jobs of drawing requests with `Prefer: respond-async` or `Idempotency-Key`; others pass untouched."""

from __future__ import annotations

import asyncio
import functools
import secrets
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

from fastapi import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sfumato.api.http import arrivals, errors
from sfumato.api.http.error_shapes import ErrorShapes, Shape
from sfumato.api.http.middleware import UnhandledErrors
from sfumato.api.jobs.documents import job_json
from sfumato.api.jobs.headers import Wishes, fingerprint, key_digest, wishes
from sfumato.api.jobs.jobs import CHECK_S, FIRST_S, Jobs
from sfumato.api.jobs.run import REPLAYED, Run, saved_scope
from sfumato.api.jobs.tables import Answer, StoredJob, route_of
from sfumato.api.openai.answers import unless_gone
from sfumato.errors import Cancelled, JobsUnavailable, SfumatoError

POLL_S = 0.5
"""Interval of looking for the answer of a job that another server carries out."""


Present: TypeAlias = Callable[[StoredJob, Run | None, Answer | None], dict[str, Any]]
"""A job as its own API shows it; the answer is there once it has ended."""


class StoredRequests:
    """ASGI middleware, outside `Arrivals`: the caller is known here, and everything inside is carried out again.

    `selected`: the model that a caller has selected, if any. `webhook` checks a URL that is to be told.
    `shared`: without API keys, all callers share their keys. `presented`: paths whose requests are always jobs → what
    their clients are answered at once, instead of a 202.
    """

    def __init__(
        self,
        app: ASGIApp,
        jobs: Jobs,
        shapes: Mapping[str, Shape],
        selected: Callable[[str], str | None],
        webhook: Callable[[str | None], str | None],
        *,
        shared: bool,
        presented: Mapping[str, Present],
    ) -> None:
        self.app = app
        self._presented = presented
        self._jobs = jobs
        self._selected = selected
        self._webhook = webhook
        self._shared = shared
        # The stored answer has the shape of its own API.
        jobs.shaped = functools.partial(ErrorShapes, shapes=shapes)
        jobs.app = jobs.shaped(UnhandledErrors(app))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not arrivals.draws(scope):
            await self.app(scope, receive, send)
            return
        try:
            wished = wishes(scope, always=self._present(scope) is not None)
            if wished is None:
                await self.app(scope, receive, send)
                return
            self._webhook(wished.webhook)
            await self._as_job(wished, scope, receive, send)
        except SfumatoError as error:
            await errors.response(error)(scope, receive, send)

    async def _as_job(self, wished: Wishes, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"]
        with self._jobs.service.register_arrival(state["request_id"], state["caller"]) as arrival:
            body = await _body(lambda: arrivals.unless_cancelled(receive, arrival))
        if body is None:
            return
        request = Request(scope, receive)
        with suppress(Cancelled):  # its client is gone, and the job goes on
            await unless_gone(request, self._answer(wished, request, body, send))

    def _new(self, wished: Wishes, scope: Scope, body: bytes) -> StoredJob:
        id, caller = uuid.uuid4().hex, scope["state"]["caller"]
        # Progress of what is answered later is asked for by the id of the job.
        request_id = id if wished.respond_async else scope["state"]["request_id"]
        return StoredJob(
            id=id,
            caller=caller,
            key=key_digest("" if self._shared else caller, wished.key) if wished.key else None,
            fingerprint=fingerprint(scope, body),
            secret=secrets.token_hex(16),
            created=scope["state"]["arrived"],
            respond_async=wished.respond_async,
            server=self._jobs.store.server,
            request=saved_scope(scope, request_id, self._selected(caller)) | {"webhook": wished.webhook},
        )

    async def _answer(self, wished: Wishes, request: Request, body: bytes, send: Send) -> None:
        """Accept the request as a job, or join the one that has its key; then answer with 202, or as it is answered."""
        job = await asyncio.to_thread(self._new, wished, request.scope, body)
        while True:
            found = await self._jobs.accept(job, body)
            known = found.job if isinstance(found, Run) else found
            ours = known.id == job.id
            headers = () if ours else (REPLAYED,)
            if ours:
                body = b""  # it is carried out, whatever happens to this client
            try:
                always = self._present(request.scope) is not None
                if wished.respond_async and await _is_promised(found, wished, always=always):
                    if known.open and not known.respond_async:
                        await self._jobs.blocking(self._jobs.store.promise, known.id)
                    await self._accepted(known, headers, request, send)
                    return
                if await (found.follow(send, *headers) if isinstance(found, Run) else self._send_stored(found, send)):
                    return
            finally:
                _copy_route(found, request.scope)
            if ours:
                raise JobsUnavailable("the request is stored, but cannot be carried out now; ask for its job again")

    def _present(self, scope: Scope) -> Present | None:
        return self._presented.get(route_of(scope))

    async def _accepted(
        self, job: StoredJob, headers: Iterable[tuple[bytes, bytes]], request: Request, send: Send
    ) -> None:
        present, run = self._present(request.scope), self._jobs.run_of(job.id)
        told = None
        if present and (run is None or run.ended.is_set()):
            found: StoredJob | None = await self._jobs.blocking(self._jobs.store.get, job.id)
            job = found or job
            told = await self._jobs.blocking(self._jobs.store.answer, job.id)
        answer = JSONResponse(present(job, run, told)) if present else JSONResponse(job_json(job, run), 202)
        answer.headers["location"] = f"{request.scope.get('root_path', '')}/v1/jobs/{job.id}"
        if not present:
            answer.headers["preference-applied"] = "respond-async"
        answer.raw_headers.extend(headers)
        await answer(request.scope, request.receive, send)

    async def _send_stored(self, job: StoredJob, send: Send) -> bool:
        """Send the stored answer of a job, which another server may have yet to end; False if it is not there."""
        found: StoredJob | None = job
        while found and found.open:
            if run := self._jobs.run_of(job.id):  # taken over
                return await run.follow(send, REPLAYED)
            await asyncio.sleep(POLL_S)
            found = await self._jobs.blocking(self._jobs.store.get, job.id)
        answer = await self._jobs.blocking(self._jobs.store.answer, job.id) if found else None
        if answer is None:
            return False
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers]
        await send({"type": "http.response.start", "status": answer.status, "headers": [*headers, REPLAYED]})
        await send({"type": "http.response.body", "body": answer.body})
        return True


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None if the client leaves before it has sent it."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


async def _is_promised(found: Run | StoredJob, wished: Wishes, *, always: bool) -> bool:
    """Whether it is told of its job: not if that was refused at once, or, unless `always`, ends while it waits."""
    if not isinstance(found, Run):
        return True
    await _within(CHECK_S, found.checked)
    await _within(FIRST_S, found.settled)
    if not found.stored:
        return False
    found.promise()
    await _within(wished.wait_s, found.ended)
    return always or not (wished.wait_s and found.ended.is_set())


def _copy_route(found: Run | StoredJob, scope: Scope) -> None:
    """For log and metrics."""
    if isinstance(found, Run):
        scope.update({name: found.scope[name] for name in ("route", "path_params") if name in found.scope})


async def _within(seconds: float, event: asyncio.Event) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
