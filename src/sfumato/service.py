"""What every front end calls: checks a request, splits it into generations and has them drawn."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import re
import secrets
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from sfumato import logs, pictures, schedulers
from sfumato.catalog import Catalog
from sfumato.config import ModelConfig
from sfumato.core import MAX_SEED, QUALITIES, Done, Failed, Generation, Step
from sfumato.engine.protocol import Engine
from sfumato.errors import (
    Cancelled,
    InvalidRequest,
    RequestNotFound,
    SfumatoError,
    TimedOut,
    TooManyRequests,
    WorkerDied,
)
from sfumato.fetch import PictureFetcher
from sfumato.job import Job, Part, Progress
from sfumato.metrics import Metrics
from sfumato.queue import MAX_RETRY_AFTER_S, Queue
from sfumato.settings import Settings

log = logging.getLogger(__name__)

MAX_PROMPT = 32_000
MAX_REMEMBERED = 256
"""Requests whose end can still be asked for."""
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MAX_PICTURES = 16
RANDOM_SEED = -1
"""What AUTOMATIC1111 and LocalAI clients send for "any seed"."""

OnStep: TypeAlias = Callable[[int, Step], None]
"""Called with the index of the picture and its step."""

Number = TypeVar("Number", int, float)

_SIZE = re.compile(r"\s*([0-9]{1,9})\s*[xX×]\s*([0-9]{1,9})\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """One request of a caller, before anything was looked at. None means not given."""

    prompts: Sequence[str]
    bar: bool = True
    """Whether `positive|negative` in a prompt are two; elsewhere the bar means other things."""
    model: str | None = None
    negative_prompt: str | None = None
    n: int | None = None
    size: str | None = None
    """`WIDTHxHEIGHT` in pixels, `auto` or None."""
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    """0 .. MAX_SEED; -1 or None: a random one."""
    scheduler: str | None = None
    clip_skip: int | None = None
    strength: float | None = None
    images: Sequence[str | bytes] = ()
    """Source pictures: file bytes, base64, `data:` URI or http(s) URL."""
    mask: str | bytes | None = None
    """White is redrawn; where the picture has transparency, transparent is redrawn."""
    quality: str | None = None
    """A name of `core.QUALITIES`: steps by the model's table, unless `steps` says a number."""
    transparent: bool = False
    upscale: int | None = None
    """2 or 4: the source picture so many times larger."""
    savings: tuple[str, ...] = ()
    """Names of `core.SAVINGS`, of a picture that is to be made again."""
    previews: int = 0
    """Of each picture on its way, 0 .. core.MAX_PREVIEWS."""
    id: str = ""
    """By which its progress can be asked for and which cancels it; empty: a new one."""
    caller: str = ""
    """Whoever asks: callers share the engine fairly."""
    operator: bool = False
    """Asked by whoever owns the model files: their `enable_parameters` does not bind."""


class Service:
    """Draws for every front end. One instance a process."""

    def __init__(self, catalog: Catalog, engine: Engine, settings: Settings) -> None:
        self.catalog = catalog
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics()
        self.queue = Queue(settings.max_active, settings.max_queue)
        self._fetcher = PictureFetcher(settings.picture_hosts.split(","))
        self._jobs: list[Job] = []
        self._ended: deque[Progress] = deque(maxlen=MAX_REMEMBERED)

    async def start(self) -> None:
        await self.engine.start()

    async def stop(self) -> None:
        await self.engine.stop()
        await self._fetcher.close()

    async def draw(self, request: ImageRequest, on_step: OnStep | None = None) -> list[Done]:
        """The pictures, in order: for each prompt `n` of them. All of them or an error.

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
        """Check a request and put it in the line. Raises what is wrong with it, or that the line is full."""
        self.catalog.refresh()
        config = self.catalog.get(request.model)
        generations = await self.plan(request, config)
        try:
            self._admit(config, len(generations))
            tickets = self.queue.join(request.caller, len(generations))
        except TooManyRequests as error:
            self.metrics.rejected(error.code)
            raise
        parts = [Part(generation, ticket) for generation, ticket in zip(generations, tickets, strict=True)]
        job = Job(request.id or uuid.uuid4().hex, request.caller, config, self.queue, parts)
        self._jobs.append(job)
        job.task = asyncio.create_task(self._run(job))
        job.task.add_done_callback(functools.partial(self._end, job))
        log.info("%s is asked for %s", config.name, ", ".join(part.generation.id for part in parts))
        if self.settings.log_prompts:
            log.info("%s is to draw %r", config.name, list(request.prompts))
        return job

    def jobs(self, caller: str | None = None, id: str | None = None) -> list[Job]:
        """Those that wait or draw, oldest first: of one caller, of one id."""
        return [job for job in self._jobs if caller in (None, job.caller) and id in (None, job.id)]

    async def cancel(self, jobs: Sequence[Job]) -> None:
        """End them, within a denoising step each; returns when they are over."""
        tasks = [job.task for job in jobs if job.task]
        for job in jobs:
            job.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def progress(self, id: str, caller: str | None = None) -> Progress:
        """Of the latest request of that id (and caller), for a while after its end too. Raises RequestNotFound."""
        if jobs := self.jobs(caller, id):
            return jobs[-1].progress()
        for ended in reversed(self._ended):
            if ended.id == id and caller in (None, ended.caller):
                return ended
        raise RequestNotFound(
            f"no request {id!r} of yours waits, draws or ended lately. The id is the answer's x-request-id header; "
            "a request may bring its own in that header.",
            param="id",
        )

    async def plan(self, request: ImageRequest, config: ModelConfig) -> list[Generation]:
        """The generations a request stands for. Raises InvalidRequest that names the field at fault."""
        prompt_pairs = [_split(prompt) if request.bar else (prompt, None) for prompt in request.prompts]
        if not prompt_pairs:
            raise InvalidRequest("prompt: a text or a list of texts is needed", param="prompt")
        texts = [
            *(("prompt", prompt) for prompt in request.prompts),
            ("negative_prompt", request.negative_prompt or ""),
        ]
        for name, text in texts:
            if len(text) > MAX_PROMPT:
                raise InvalidRequest(f"{name}: {len(text)} characters; at most {MAX_PROMPT} are taken", param=name)
        most = self.settings.max_n
        n = request.n if request.n is not None else min(config.n or 1, most)
        _within("n", n, 1, most)
        if n * len(prompt_pairs) > most:
            raise InvalidRequest(
                f"n: {len(prompt_pairs)} prompts with {n} pictures each; at most {most} in one request",
                param="n",
            )
        _within("steps", request.steps, 1, MAX_STEPS)
        _within("guidance_scale", request.guidance_scale, 0, MAX_GUIDANCE)
        _within("strength", request.strength, 0, 1)
        _within("clip_skip", request.clip_skip, 0, 64)
        if request.quality is not None and request.quality not in QUALITIES:
            raise InvalidRequest(
                f"quality: {request.quality[:100]!r}; {', '.join(QUALITIES)} or a number of steps are valid",
                param="quality",
            )
        if request.scheduler:
            schedulers.parse(request.scheduler)
        size = self._size(request.size)
        images, mask = await self._pictures(request)
        if images and size is None:
            self._refuse_large(images[0], request.upscale or 1)
        if request.strength is not None and not images:
            raise InvalidRequest("strength: says how far to leave a source picture; send `image`", param="strength")
        seed = self._seed(config.seed if request.seed is None else request.seed, n)
        generations = []
        for prompt, inline_negative in prompt_pairs:
            negative = ", ".join(text for text in (request.negative_prompt, inline_negative) if text)
            asked = Generation(
                id="",
                prompt=prompt,
                negative_prompt=negative or request.negative_prompt,
                seed=seed,
                width=size and size[0],
                height=size and size[1],
                steps=request.steps,
                guidance_scale=request.guidance_scale,
                scheduler=request.scheduler or None,
                clip_skip=request.clip_skip,
                strength=request.strength,
                images=images,
                mask=mask,
                quality=request.quality,
                transparent=request.transparent,
                upscale=request.upscale,
                savings=request.savings,
                previews=request.previews,
                caller=request.caller,
            )
            if not request.operator:
                _refuse_disabled(config, asked)
            generations += [replace(asked, id=uuid.uuid4().hex, seed=seed + i) for i in range(n)]
        return generations

    async def _run(self, job: Job) -> None:
        limit = self.settings.time_limit_s
        try:
            async with asyncio.timeout(limit), asyncio.TaskGroup() as group:
                for index, part in enumerate(job.parts):
                    group.create_task(self._one(job, index, part))
        except TimeoutError:
            raise TimedOut(
                f"not drawn within {limit} s (the setting time_limit_s): ask for fewer steps or a smaller size"
            ) from None
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the first to fail is why the others were cancelled

    def _end(self, job: Job, task: asyncio.Task[None]) -> None:
        """Called however the job's task ended, also when it was cancelled before it began."""
        for part in job.parts:
            self.queue.leave(part.ticket, drawn=False)
        raised = Cancelled("the request was cancelled") if task.cancelled() else task.exception()
        error = raised if isinstance(raised, SfumatoError) else None
        if raised and not error:
            log.error("request %s failed: %s", job.id, logs.place(raised))
            error = SfumatoError(f"an error of the server's own ({type(raised).__name__}); its log says more")
        if error:
            self.metrics.failed(job.config.name, error.code)
        job.end(error)
        self._jobs.remove(job)
        self._ended.append(job.progress())

    async def _one(self, job: Job, index: int, part: Part) -> None:
        came = time.monotonic()
        await part.ticket.called.wait()
        began = time.monotonic()
        self.metrics.waited(began - came)
        try:
            async with aclosing(self.engine.submit(job.config, part.generation)) as events:
                async for event in events:
                    match event:
                        case Failed(error):
                            raise error
                        case _:
                            job.put(index, event)
        finally:
            self.queue.leave(part.ticket, drawn=part.done is not None)
        if not part.done:
            raise WorkerDied("the engine ended without an answer")
        self.metrics.drew(job.config.name, time.monotonic() - began)

    def _admit(self, config: ModelConfig, pictures: int) -> None:
        running = sum(not part.done for job in self._jobs if job.config.name == config.name for part in job.parts)
        limit = config.max_concurrent
        if limit is not None and running and running + pictures > limit:
            raise TooManyRequests(
                f"{config.name} draws {running} pictures now; its file allows {limit} at a time "
                "(limits.max_concurrent). Try again later.",
                retry_after=min(config.retry_after, MAX_RETRY_AFTER_S),
            )

    def _size(self, text: str | None) -> tuple[int, int] | None:
        if text is None or text.strip().lower() in ("", "auto"):
            return None
        match = _SIZE.fullmatch(text)
        if not match:
            raise InvalidRequest(f"size: {text[:100]!r} is not WIDTHxHEIGHT (such as 512x512) or auto", param="size")
        width, height = int(match[1]), int(match[2])
        limit = self.settings.max_pixels
        if min(width, height) < 1 or width * height > limit:
            raise InvalidRequest(
                f"size: {width}x{height}; both sides need at least 1 pixel, and at most {limit} pixels in all "
                f"({math.isqrt(limit)}x{math.isqrt(limit)}) are drawn",
                param="size",
            )
        return width, height

    def _refuse_large(self, source: bytes, factor: int) -> None:
        """Without a size a picture is drawn at its source's, so many times."""
        width, height = (side * factor for side in pictures.size(source))
        if width * height > self.settings.max_pixels:
            raise InvalidRequest(
                f"image: it would become {width}x{height}; at most {self.settings.max_pixels} pixels are drawn. "
                "Send a size, or a smaller picture.",
                param="image",
            )

    def _seed(self, seed: int | None, n: int) -> int:
        if seed is None or seed == RANDOM_SEED:
            return secrets.randbelow(2**32)  # short enough for every client's numbers
        if not 0 <= seed <= MAX_SEED - (n - 1):
            raise InvalidRequest(
                f"seed: {seed}; 0 to {MAX_SEED} are valid (less n - 1), -1 or no seed for a random one",
                param="seed",
            )
        return seed

    async def _pictures(self, request: ImageRequest) -> tuple[tuple[bytes, ...], bytes | None]:
        if len(request.images) > MAX_PICTURES:
            raise InvalidRequest(
                f"image: {len(request.images)} pictures; at most {MAX_PICTURES} are taken", param="image"
            )
        images = tuple([await self._picture(image, "image") for image in request.images])
        if request.mask is None:
            return images, None
        if not images:
            raise InvalidRequest("mask: says where to redraw a picture; send `image` too", param="mask")
        mask = await self._picture(request.mask, "mask")
        return images, await asyncio.to_thread(pictures.as_mask, mask)

    async def _picture(self, picture: str | bytes, param: str) -> bytes:
        if isinstance(picture, bytes):
            data = picture
        elif picture.strip().lower().startswith(("http://", "https://")):
            data = await self._fetcher.get(picture.strip(), param)
        else:
            data = await asyncio.to_thread(pictures.from_text, picture, param)
        # Decoding megapixels takes a while, and the event loop has others to answer.
        return await asyncio.to_thread(pictures.normalise, data, param, self.settings.max_source_pixels)


def _split(prompt: str) -> tuple[str, str | None]:
    """`positive|negative`, LocalAI's way to send both in one field."""
    positive, bar, negative = prompt.partition("|")
    return (positive.strip(), negative.strip() or None) if bar else (prompt, None)


def _refuse_disabled(config: ModelConfig, asked: Generation) -> None:
    used = {
        "negative_prompt": asked.negative_prompt,
        "num_inference_steps": asked.steps,
        "clip_skip": asked.clip_skip,
        "image": None if asked.upscale else asked.images or None,  # an upscaler that takes no picture is none
    }
    for name, value in used.items():
        if value is not None and not config.enables(name):
            raise InvalidRequest(
                f"{name}: {config.name} does not let requests set it. Add {name} to "
                f"diffusers.enable_parameters in {config.file}, or leave it out.",
                param=name,
            )


def _within(name: str, value: Number | None, least: float, most: float) -> None:
    if value is not None and not least <= value <= most:  # NaN neither
        raise InvalidRequest(f"{name}: {value}; {least} to {most} are valid", param=name)
