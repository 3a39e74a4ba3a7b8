"""Carries out stored requests, once each, and again after a crash."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

from starlette.types import ASGIApp

from sfumato import logs
from sfumato.api.http import errors
from sfumato.api.jobs.run import Run, receiver, restored_scope
from sfumato.api.jobs.store import JobStore
from sfumato.api.jobs.tables import StoredJob
from sfumato.api.webhooks import outbox
from sfumato.errors import Cancelled, JobsUnavailable, KeyReused, NoWorker, SfumatoError, TooManyRequests, WorkerDied
from sfumato.serving import repeat
from sfumato.serving.job import CANCELLED
from sfumato.serving.service import Service

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

THREADS = 4
"""Threads that wait for the database."""

BEAT_S = 5.0
"""Interval of signs of life, and of looking for jobs that nobody carries out. Well below `store.LEASE_S`."""

FIRST_S = 2.0
"""How long a request whose check found nothing is given to stand in the queue before it is promised to be drawn: it may
wait for a LoRA that is downloaded for it."""

CHECK_S = 30.0
"""How long the check may take: it reads the body and this disk, on a busy machine for longer than `FIRST_S`."""

AGAIN_S = 5.0
"""Seconds until a promised job that found the queue full or no worker, or an answer that could not be stored, is tried
again."""

MAX_LIVES = 20
"""How often a job is begun. One that always takes its server with it must not do so for ever."""

MAX_DEATHS = 3
"""How often a server tries a promised job during which two workers died. Who kills workers need not be the job: a
memory that others have filled, or an operator."""

STOP_S = 10.0
"""How long a server that stops waits for a database that does not answer."""

EXPIRE_S = 600.0
"""Interval at which expired jobs are deleted, also when none ends."""


async def pause(run: Run) -> None:
    """Until it may be tried again, or is cancelled."""
    with suppress(TimeoutError):
        async with asyncio.timeout(AGAIN_S):
            await run.cancelled.wait()


class Jobs:
    """The jobs of one server. `app` answers their requests; the middleware sets it, and `shaped`."""

    app: ASGIApp
    shaped: Callable[[ASGIApp], ASGIApp]
    """Gives errors the shape of the API whose path was called."""
    application: object
    """For the scope of requests."""

    def __init__(self, service: Service, store: JobStore) -> None:
        self.service = service
        self.store = store
        self._runs: dict[str, Run] = {}
        """Id → what this process carries out."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads: ThreadPoolExecutor | None = None
        self.stopping = asyncio.Event()
        """Set when the server waits for its last requests."""
        self._waiting = 0
        """Promised jobs that wait for their next try."""
        self._stopped = False
        self._some_ended = False
        self._keeper: asyncio.Task[None] | None = None

    async def blocking(self, call: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
        """A call of the store, in a thread of its own."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, "jobs")
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(call, *args, **more))

    def start(self) -> None:
        """Carry out what was accepted and did not end, and whatever other servers leave behind."""
        self._stopped = False
        self.stopping.clear()
        self._keeper = asyncio.create_task(self._keep())
        self._keeper.add_done_callback(_report)

    async def stop(self) -> None:
        """Leave what has not ended to the next start."""
        self._stopped = True
        tasks = [*self._tasks, *([self._keeper] if self._keeper else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._threads:
            with suppress(JobsUnavailable, TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await self.blocking(self.store.leave)
                    await asyncio.to_thread(self._threads.shutdown)
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None
        self.store.close()

    def run_of(self, id: str) -> Run | None:
        """What this process carries out of that job."""
        return self._runs.get(id)

    async def accept(self, job: StoredJob, body: bytes) -> StoredJob | Run:
        """Store a request and begin to carry it out; or the job that has its key already, or its run if it is ours.

        Raises KeyReused if that is another request, JobsUnavailable if nothing can be stored, and TooManyRequests for a
        new job if as many as the queue has room for wait for their next try.
        """
        full = self._waiting >= self.service.settings.max_queue
        if full and not (job.key is not None and await self.blocking(self.store.has_key, job.key)):
            raise TooManyRequests(
                f"{self._waiting} accepted requests wait for a worker, or for room in the queue. Try again later.",
                retry_after=int(AGAIN_S),
            )
        run = self._runs[job.id] = Run(job)  # before it is stored: nobody may take it for one that was left behind
        try:
            found = await self.blocking(self.store.accept, job, body)
        except BaseException:
            # If the database has stored it nevertheless, `_keep` will find it.
            del self._runs[job.id]
            raise
        if found is None:
            self._begin(run, body)
            return run
        del self._runs[job.id]
        if found.fingerprint != job.fingerprint:
            raise KeyReused(
                "Idempotency-Key: this key came with another request before. Send the same method, path, query, "
                "content type, x-webhook-url and body, or a new key.",
                param="Idempotency-Key",
            )
        return self._runs.get(found.id, found)

    async def cancel(self, job: StoredJob) -> None:
        """End it within one denoising step; returns when it has ended, if this process carries it out."""
        await self.blocking(self.store.cancel, job.id)
        if run := self._runs.get(job.id):
            await self.cancel_run(run)

    async def cancel_run(self, run: Run) -> None:
        """End what this process carries out of a job within one denoising step; returns when it has ended."""
        run.cancelled.set()
        job, stored = run.repeatable.job, run.job
        if job:
            await self.service.cancel([job])
        else:
            await self.service.cancel([], self.service.arrivals(stored.caller, stored.request_id))
        await run.ended.wait()

    def _begin(self, run: Run, body: bytes | None = None) -> None:
        task = asyncio.create_task(self._carry_out(run, [body] if body is not None else []))
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._over, run))

    def _over(self, run: Run, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        del self._runs[run.job.id]
        run.end()
        _report(task)

    async def _carry_out(self, run: Run, bodies: list[bytes]) -> None:
        """Draw it, and store the answer. `bodies` has that of the request, or nothing: then the store has it."""

        async def body() -> bytes | None:
            return bodies.pop() if bodies else await self.blocking(self.store.body, run.job.id)

        if not await self.draw(run, body, self._pause):
            return
        run.stored = _is_stored(run)
        run.settle()
        await self._conclude(run)
        run.end()

    async def _pause(self, run: Run) -> None:
        self._waiting += 1
        try:
            await pause(run)
        finally:
            self._waiting -= 1

    async def draw(
        self, run: Run, body: Callable[[], Awaitable[bytes | None]], pause: Callable[[Run], Awaitable[None]]
    ) -> bool:
        """Let the application answer a stored request, again while it was promised and there is no room or no worker.

        Also again, but not for ever, if workers died during it.

        `body` reads that of the request, each time. `pause`: waits before the next try. False: it has no body, as it
        has ended; or the server stops, and what was answered is not the answer.
        """
        job = run.job
        logs.request_id.set(job.request_id)
        repeat.CURRENT.set(run.repeatable)
        deaths = 0
        while True:
            sent = await body()
            if sent is None:
                return False
            scope = restored_scope(job, self.application, len(sent))
            receive = receiver(sent)
            del sent
            await self._answer(run, scope, receive)
            if self._stopped:
                return False
            deaths += _failed_by(run, WorkerDied) and not _failed_by(run, NoWorker)
            if deaths == MAX_DEATHS or not _again(run):
                return True
            run.again()
            run.repeatable = repeat.Repeatable(job.secret, job.created, job.request.get("selected"))
            repeat.CURRENT.set(run.repeatable)
            await pause(run)

    async def _answer(self, run: Run, scope: Any, receive: Any) -> None:
        run.scope = scope
        waiter = asyncio.create_task(run.follow_submission())
        try:
            await (self._refusal(run) or self.app)(scope, receive, run.record)
            if not run.answered:
                failure = SfumatoError("internal server error (no answer); see the server's log")
                await self.shaped(errors.response(failure))(scope, receive, run.record)
        finally:
            waiter.cancel()

    def _refusal(self, run: Run) -> ASGIApp | None:
        """The answer of a job that is not carried out (again)."""
        if run.cancelled.is_set():
            return self.shaped(errors.response(Cancelled(CANCELLED)))
        if run.job.lives > MAX_LIVES:
            error = SfumatoError(f"the server died {run.job.lives - 1} times before this request was answered")
            return self.shaped(errors.response(error))
        return None

    async def _conclude(self, run: Run) -> None:
        """Store the answer. Its clients get it even if the database cannot take it now; that is tried until it can."""
        id, answer, state = run.job.id, run.answer, _state(run)
        url = run.job.request.get("webhook")
        then = [functools.partial(outbox.add, url=url, event=f"job.{state}", subject=id)] if url else []
        end = functools.partial(self.store.end, id, state, answer, *then)
        while not await self._try(end if run.stored else functools.partial(self.store.forget, id)):
            run.end()
            await asyncio.sleep(AGAIN_S)
        self._some_ended = True
        log.info("job %s: %s, status %d", id, state if run.stored else "refused", answer.status)

    async def _try(self, call: Callable[[], object]) -> bool:
        try:
            await self.blocking(call)
        except JobsUnavailable as error:
            log.warning("%s", error.message)
            return False
        return True

    async def _keep(self) -> None:
        """Until it is cancelled."""
        recovering: asyncio.Task[None] | None = None
        since_expired = EXPIRE_S
        try:
            while True:
                try:
                    if self._runs:
                        await self._beat()
                    if recovering is None or recovering.done():
                        recovering = asyncio.create_task(self._recover())
                        recovering.add_done_callback(_report)
                    if self._some_ended or since_expired >= EXPIRE_S:
                        self._some_ended, since_expired = False, 0.0
                        await self._try(self.store.expire)
                except Exception as error:  # any error: without a next round this server would be taken for dead
                    log.error("jobs: %s", logs.error_location(error))
                await asyncio.sleep(BEAT_S)
                since_expired += BEAT_S
        finally:
            if recovering:
                recovering.cancel()

    async def _beat(self) -> None:
        try:
            cancelled = await self.blocking(self.store.beat)
        except JobsUnavailable as error:
            log.warning("%s", error.message)
            return
        for id in cancelled & self._runs.keys():
            run = self._runs[id]
            if not run.cancelled.is_set():
                task = asyncio.create_task(self.cancel_run(run))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _recover(self) -> None:
        """Carry out what nobody does, oldest first: each enters the queue before the next one."""
        try:
            claimed = await self.blocking(self.store.claim, set(self._runs))
        except JobsUnavailable as error:
            log.warning("%s", error.message)
            return
        for job in claimed:
            if job.id in self._runs:
                continue  # it was accepted in the meantime
            log.info("job %s was accepted and has not ended: it is carried out again", job.id)
            run = self._runs[job.id] = Run(job, promised=True)
            if job.cancelled:
                run.cancelled.set()
            self._begin(run)
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_S):
                    await run.settled.wait()


def _report(task: asyncio.Task[None]) -> None:
    """Log the unexpected error that ended a task."""
    if not task.cancelled() and (error := task.exception()):
        log.error("jobs: %s", logs.error_location(error))


def _again(run: Run) -> bool:
    """Whether there was no room for a job that was promised, no worker lived, or no file was read; and nobody has seen
    that."""
    failed = run.answer.status == 429 or run.repeatable.unread or _failed_by(run, WorkerDied)
    return failed and run.promised and not run.seen


def _failed_by(run: Run, kind: type[WorkerDied]) -> bool:
    """Whether workers are the reason: also where a stream says so, whose status is 200."""
    job = run.repeatable.job
    return job is not None and isinstance(job.error, kind)


def _is_stored(run: Run) -> bool:
    """A refusal that a new try may overcome is no answer, nor is one of a request that was never promised."""
    status, job = run.answer.status, run.repeatable.job
    if status < 400 and job is not None and job.error is not None:  # the last event of a stream
        status = job.error.status
    if status == 429 or (status == 503 and not (run.job.respond_async and run.promised)):
        return False
    return status < 400 or run.promised or job is not None


def _state(run: Run) -> str:
    status, job = run.answer.status, run.repeatable.job
    if job and job.over and job.state in ("failed", "cancelled"):
        return job.state
    return "completed" if status < 400 else "cancelled" if status == 499 else "failed"
