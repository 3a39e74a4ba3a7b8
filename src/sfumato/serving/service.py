"""What every front end calls: a request becomes a job in the queue, whose pictures the engine draws."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import TypeAlias

from sfumato import logs
from sfumato.checkpoints import read_ahead, remote_limits
from sfumato.config import ModelConfig
from sfumato.core import BATCH, Done, Failed, Step
from sfumato.engine.protocol import Engine, Load, Pin, Unload
from sfumato.errors import (
    Cancelled,
    RequestNotFound,
    SfumatoError,
    TimedOut,
    TooManyRequests,
    WorkerDied,
)
from sfumato.formats import IMAGE, VIDEO, kind_of
from sfumato.pictures.budget import Budget, Share
from sfumato.pictures.decoder_pool import Decoders
from sfumato.pictures.fetch import PictureFetcher
from sfumato.pictures.sources import Decoded, Sources, encoded_size, file_of
from sfumato.serving import named_controls, repeat, time_limits
from sfumato.serving.catalog import Catalog
from sfumato.serving.foreseen import Foreseen
from sfumato.serving.job import CANCELLED, Arrival, Job, Part, Progress
from sfumato.serving.metrics import Metrics
from sfumato.serving.own_size import own_size
from sfumato.serving.planning import ImageRequest, plan
from sfumato.serving.queue import MAX_RETRY_AFTER_S, Queue
from sfumato.serving.request_loras import RequestLoras
from sfumato.serving.source_files import sources, told_apart
from sfumato.serving.time_limits import DrawingTime
from sfumato.settings import Settings, host_names
from sfumato.status import Abilities

log = logging.getLogger(__name__)

MAX_REMEMBERED = 256
"""Number of ended requests whose progress is still available."""
OnPictureStep: TypeAlias = Callable[[int, Step], None]
"""Called with the index of the picture and its step."""


class Service:
    """Draws for every front end. One instance per process."""

    def __init__(self, catalog: Catalog, engine: Engine, settings: Settings) -> None:
        self.catalog = catalog
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics()
        self.queue = Queue(settings.max_active * max(1, len(engine.devices)), settings.max_queue)
        self.decoders = Decoders(settings, settings.decoders)
        self._clip_decoders = Decoders(settings, 1, clips=True)
        self._text_decoders = Decoders(settings, 1)
        """Separate decoder for texts, so that reading them does not delay drawing requests."""
        self.budget = Budget(settings.max_waiting_mb * 2**20, self.queue.retry_after)
        self.limits = settings.limits
        self.fetcher = PictureFetcher(host_names(settings.picture_hosts))
        self._loras = RequestLoras(settings)
        self._parts: dict[str, Part] = {}
        """Those whose generations the engine has."""
        engine.on_place = self._place
        engine.on_device = self._on_device
        engine.on_places = self.queue.resize
        self._arrivals: list[Arrival] = []
        self._jobs: list[Job] = []
        self._pins: dict[str, bool] = {}
        self._read_ahead: set[str] = set()
        """Models whose weights are read while the worker starts."""
        self._foreseen = Foreseen()
        self._ended: deque[Progress] = deque(maxlen=MAX_REMEMBERED)

    async def start(self) -> None:
        await self.engine.start()

    async def stop(self) -> None:
        await self.engine.stop()
        await self.fetcher.close()
        await self.decoders.stop()
        await self._clip_decoders.stop()
        await self._text_decoders.stop()

    async def draw(self, request: ImageRequest, on_step: OnPictureStep | None = None) -> list[Done]:
        """The pictures in order, `n` for each prompt: all of them, or an error.

        Cancelling the task cancels the work.
        """
        job = await self.submit(request)
        if on_step is None:
            return await job.pictures()
        async with aclosing(job.events()) as events:
            async for index, event in events:
                if isinstance(event, Step):
                    on_step(index, event)
        return await job.pictures()

    async def submit(self, request: ImageRequest) -> Job:
        """Check a request and put it into the queue. Raises if it is invalid, or if the queue is full.

        Its source pictures are checked once it has a place; an error in them ends the job.
        """
        self.catalog.refresh()
        config = self.catalog.get(request.model)
        request = await self._told_apart(request, config)
        generations = plan(request, config, self.limits, self.settings.max_n)
        prompts = await self._check_inputs(request, config)
        generations = await self._loras.with_files(generations, config, repeat.set_checked)
        repeat.set_checked()
        stored = repeat.CURRENT.get()
        # Nothing is awaited from here on, so that its progress is always known and cancelling it always works.
        if arrival := self._arrival(request.id, request.caller):
            arrival.submit()
        low = request.priority == BATCH
        share = self.budget.share(low=low)
        try:
            self._admit(config, len(generations), low=low)
            tickets = self.queue.join(
                request.caller,
                len(generations),
                model=config.name,
                ready=not request.has_sources,
                low=low,
                due_in_s=math.inf if request.deadline is None else request.deadline - time.time(),
            )
        except TooManyRequests as error:
            self.metrics.record_rejection(error.code)
            raise
        limit = self.settings.time_limit_s if stored else None
        drawn = zip(generations, tickets, strict=True)
        parts = [Part(generation, ticket, DrawingTime(limit)) for generation, ticket in drawn]
        job = self._job_of(request, config, parts, share)
        try:
            files = sources(request, share, prompts, self.limits)
        except SfumatoError as error:
            self._leave(job)
            if isinstance(error, TooManyRequests):
                self.metrics.record_rejection(error.code)
            raise
        if not self.engine.ready and config.name not in self._read_ahead:
            self._read_ahead.add(config.name)
            read_ahead.begin(config)
        self._jobs.append(job)
        if stored:
            stored.submit(job)
        job.task = asyncio.create_task(self._run(job, files))
        job.task.add_done_callback(functools.partial(self._end, job))
        log.info("%s: accepted %s", config.name, ", ".join(part.generation.id for part in parts))
        if self.settings.log_prompts:
            log.info("%s will draw %r", config.name, list(request.prompts))
        return job

    def _job_of(self, request: ImageRequest, config: ModelConfig, parts: Sequence[Part], share: Share) -> Job:
        return Job(
            request.id or uuid.uuid4().hex,
            request.caller,
            config,
            self.queue,
            parts,
            share=share,
            detached=request.detached,
            keep=request.keep,
            deadline=request.deadline,
        )

    @contextmanager
    def register_arrival(self, id: str, caller: str) -> Iterator[Arrival]:
        """A request of which only the id is known yet; its progress and cancelling work from now on."""
        arrival = Arrival(id, caller)
        self._arrivals.append(arrival)
        try:
            yield arrival
        finally:
            self._arrivals.remove(arrival)
            if arrival.cancelled.is_set() and not arrival.submitted:
                self._ended.append(arrival.progress())

    async def texts(self, picture: str | bytes) -> dict[str, str]:
        """The texts in a picture file (see `recipe.texts`): its bytes, base64, `data:` URI or URL.

        Raises InvalidPicture, or TooManyRequests if too many pictures are in memory already.
        """
        share = self.budget.share()
        try:
            share.take(encoded_size(picture))
            data = await file_of(picture, "image", self.fetcher, share)
            del picture
            answer, _ = await self._text_decoders.run("texts", data, "image")
        finally:
            share.give_back()
        texts: dict[str, str] = answer["texts"]
        return texts

    def load(self, name: str | None) -> None:
        """Queue the loading of a model. Raises ModelNotFound, or the error in its file."""
        self.catalog.refresh()
        self.engine.order(Load(self.catalog.get(name)))

    async def load_now(self, name: str | None) -> None:
        """Load a model, and return when it is in memory. Raises ModelNotFound, or why it cannot be loaded."""
        self.catalog.refresh()
        done = await self.engine.carry_out(Load(self.catalog.get(name)))
        if done.error:
            raise done.error

    async def unload(self, name: str | None) -> tuple[str, ...]:
        """Unload a model (None: all), and return when its memory is free; those in use, which are returned, leave when
        their requests end. Raises ModelNotFound."""
        self.catalog.refresh()
        done = await self.engine.carry_out(Unload(self._loaded_name(name) if name is not None else None))
        return done.in_use

    def _loaded_name(self, name: str) -> str:
        """The name in the engine. A model whose file has gone, or is broken now, may still be in memory."""
        try:
            return self.catalog.get(name).name
        except SfumatoError:
            if self.engine.status(name).state in ("unloaded", "failed"):
                raise
            return name

    def pin(self, name: str, pinned: bool) -> None:
        """Pin or unpin a model until this process ends. Raises ModelNotFound."""
        self.catalog.refresh()
        config = self.catalog.get(name)
        self._pins[config.name] = pinned
        self.engine.order(Pin(config.name, pinned))

    def pinned(self, config: ModelConfig) -> bool:
        return self._pins.get(config.name, config.pinned)

    def jobs(self, caller: str | None = None, id: str | None = None) -> list[Job]:
        """Queued and running jobs, oldest first, optionally only those of one caller or one id."""
        return [job for job in self._jobs if caller in (None, job.caller) and id in (None, job.id)]

    async def cancel(self, jobs: Sequence[Job], arrivals: Sequence[Arrival] = ()) -> None:
        """End them, each within one denoising step; returns when all have ended."""
        for arrival in arrivals:
            arrival.cancelled.set()
        tasks = [job.task for job in jobs if job.task]
        for job in jobs:
            job.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def cancel_id(self, id: str, caller: str | None = None) -> Progress:
        """End every request of that id (and caller), including those still being received; returns the final progress.

        Raises RequestNotFound.
        """
        self.progress(id, caller)
        await self.cancel(self.jobs(caller, id), self.arrivals(caller, id))
        return self.progress(id, caller)

    def arrivals(self, caller: str | None = None, id: str | None = None) -> list[Arrival]:
        """Requests being received or answered, oldest first, optionally only those of one caller or one id."""
        return [each for each in self._arrivals if caller in (None, each.caller) and id in (None, each.id)]

    def progress(self, id: str, caller: str | None = None) -> Progress:
        """Progress of the latest request of that id (and caller), also for a while after it ended.
        Raises RequestNotFound."""
        if jobs := self.jobs(caller, id):
            return jobs[-1].progress()
        for arrival in reversed(self.arrivals(caller, id)):
            if not arrival.submitted:
                return arrival.progress()
        for ended in reversed(self._ended):
            if ended.id == id and caller in (None, ended.caller):
                return ended
        raise RequestNotFound(
            f"you have no queued, running or recent request {id!r}. The id is the answer's x-request-id header; "
            "a request may set its own in that header.",
            param="id",
        )

    async def _run(self, job: Job, sources: Sources | None) -> None:
        limit = None if repeat.CURRENT.get() else self.settings.time_limit_s  # of stored ones each picture has its own
        try:
            async with asyncio.timeout(limit), asyncio.TaskGroup() as group:
                turn = asyncio.Event()
                pictures = group.create_task(self._take_pictures(job, sources, turn)) if sources else None
                del sources  # the encoded pictures are released as soon as they are decoded
                if job.deadline is not None:
                    group.create_task(time_limits.refuse_late(turn, job.deadline - time.time()))
                for index, part in enumerate(job.parts):
                    group.create_task(self._draw_picture(job, index, part, pictures, turn))
        except TimeoutError:
            raise TimedOut(f"not drawn within {limit} s (the setting time_limit_s): {time_limits.REMEDY}") from None
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the first failure is why the others were cancelled

    async def _take_pictures(self, job: Job, sources: Sources, turn: asyncio.Event) -> Decoded:
        """Fetch the pictures immediately, and decode them when the job's turn has come."""
        await sources.fetch(self.fetcher, self.decoders, self._clip_decoders)
        self.queue.release([part.ticket for part in job.parts])
        await turn.wait()
        decoded = await sources.decode(self.decoders)
        if sources.clip:
            own, multiple = await own_size(self.engine, job.config, 0)
            decoded = replace(decoded, clip=await sources.decode_clip(self._clip_decoders, own, multiple))
        if sources.sound:
            can = await self.abilities(job.config)
            rate = can.sound.rate if can and can.sound else None
            decoded = replace(decoded, sound=await sources.decode_sound(self._clip_decoders, rate))
        return decoded

    def _leave(self, job: Job) -> None:
        for part in job.parts:
            self.queue.leave(part.ticket, drawn=False)
        job.share.give_back()

    def _end(self, job: Job, task: asyncio.Task[None]) -> None:
        """Called when the job's task has ended in any way, even if it was cancelled before it began."""
        self._leave(job)
        raised = Cancelled(CANCELLED) if task.cancelled() else task.exception()
        error = raised if isinstance(raised, SfumatoError) else None
        if raised and not error:
            log.error("request %s failed: %s", job.id, logs.error_location(raised))
            error = SfumatoError(f"internal server error ({type(raised).__name__}); see the server's log")
        if error:
            self.metrics.record_failure(job.config.name, error.code)
        job.end(error)
        self._jobs.remove(job)
        self._ended.append(job.progress())

    async def _draw_picture(
        self, job: Job, index: int, part: Part, pictures: asyncio.Task[Decoded] | None, turn: asyncio.Event
    ) -> None:
        """`turn`: set when the first picture of the job has its turn."""
        queued_at = time.monotonic()
        await part.ticket.called.wait()
        turn.set()
        turn_at = time.monotonic()
        self.metrics.record_wait(part.generation.priority, turn_at - queued_at)
        try:
            generation = part.generation
            if pictures:
                generation = (await pictures).put_into(generation)
            self._parts[generation.id] = part
            async with part.time, aclosing(self.engine.submit(job.config, generation)) as events:
                async for event in events:
                    if isinstance(event, Failed):
                        raise event.error
                    if isinstance(event, Done):
                        event = time_limits.saying_if_late(event, job.deadline)
                        if job.keep:
                            part.name = await job.keep(event)
                    job.put(index, event)
        finally:
            self._parts.pop(part.generation.id, None)
            self.queue.leave(part.ticket, drawn=part.done is not None)
        if not part.done:
            raise WorkerDied("the engine stopped without an answer")
        self.metrics.record_picture(job.config.name, part.generation.priority, time.monotonic() - turn_at)

    def _place(self, id: str, taken: bool) -> None:
        """The engine says whether a picture takes a place."""
        if part := self._parts.get(id):
            part.place(self.queue, taken)

    def _on_device(self, id: str, device: str) -> None:
        """The engine says which of several devices has a picture."""
        if part := self._parts.get(id):
            part.device = device
            self.queue.place(part.ticket, True)  # its time counts once it begins

    def _admit(self, config: ModelConfig, pictures: int, *, low: bool) -> None:
        """Raises TooManyRequests beyond the model's own limit. No interactive request is refused for others."""
        limit = config.max_concurrent
        if limit is None:
            return
        parts = [part for job in self._jobs if job.config.name == config.name for part in job.parts]
        running = sum(not part.done and (low or not part.ticket.line.low) for part in parts)
        if running and running + pictures > limit:
            raise TooManyRequests(
                f"{config.name} is drawing {running} pictures; its file allows {limit} at a time "
                "(limits.max_concurrent). Try again later.",
                retry_after=min(config.retry_after, MAX_RETRY_AFTER_S),
            )

    async def _check_inputs(self, request: ImageRequest, config: ModelConfig) -> list[str]:
        """Raises InvalidRequest for what a model that is not loaded cannot draw, so that it is not loaded for nothing.

        What controls name must be there. Returns the fields with pictures for IP-Adapters. The engine checks all this
        for every model; what is known of one in memory may be of an earlier file. A clip's errors come before its job.
        """
        hub = remote_limits.HUB in self._loras.hosts
        prompts = await named_controls.prompts(request.controls, config.folder, hub=hub)
        named = any(control.name for control in request.controls)
        # With a ControlNet of the request, another class draws.
        info = self.engine.status(config.name).info
        loaded = info and info.abilities.kind == kind_of(request.format) == IMAGE
        if named or config.ip_adapters or loaded:
            return prompts
        await self._foreseen.check(request, config, self.limits)
        return prompts

    async def _told_apart(self, request: ImageRequest, config: ModelConfig) -> ImageRequest:
        if not request.images or kind_of(request.format) != VIDEO:
            return request
        return told_apart(request, await self.abilities(config))

    async def abilities(self, config: ModelConfig) -> Abilities | None:
        """What requests may ask of a model: as it is in memory, else as its files say. None: neither is here."""
        if info := self.engine.status(config.name).info:
            return info.abilities
        return await self._foreseen.abilities(config)

    def _arrival(self, id: str, caller: str) -> Arrival | None:
        return next((each for each in reversed(self._arrivals) if (each.id, each.caller) == (id, caller)), None)
