"""Responses of the image routes: pictures in the requested format, OpenAI's response and stream."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from sfumato.api.dependencies import Context
from sfumato.api.http import errors, urls
from sfumato.api.http.auth import caller_of
from sfumato.api.http.headers import header_text
from sfumato.api.keeping import dropped_if_left, keeper
from sfumato.api.openai.bodies import Body, PaintBody
from sfumato.core import Done, Preview
from sfumato.errors import Cancelled, InvalidRequest
from sfumato.pictures import recipe
from sfumato.pictures.gallery import Gallery
from sfumato.serving.job import Job, Part
from sfumato.serving.service import Service

T = TypeVar("T")

KEEP_ALIVE_S = 15.0
"""Interval of comments in an idle stream, so that no proxy closes it."""

PATCH = 16
"""For `usage`: a picture counts one token per square with this side in pixels."""

QUALITY_NAMES = {
    "low": "low", "medium": "medium", "high": "high", "hd": "high", "xhigh": "xhigh", "max": "max",
}  # fmt: skip
"""Requested quality → OpenAI's name in responses; anything else is medium, the model's default steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFormat:
    """How the pictures of one request are returned."""

    format: str = "png"
    """png, webp or jpeg."""
    compression: int = 100
    """0 .. 100: quality of webp and jpeg."""
    opaque: bool = False
    """Put an alpha channel on white."""
    quality: str = "medium"
    """A value of `QUALITY_NAMES`."""
    base: str | None = None
    """Base of picture URLs; None: base64."""

    def encode(self, picture: Done | Preview) -> bytes:
        """The encoded picture, or preview at the picture's size."""
        size = (picture.width, picture.height) if isinstance(picture, Preview) else None
        file = picture.png if isinstance(picture, Preview) else picture.file
        return recipe.convert(file, self.format, self.compression, opaque=self.opaque, size=size)


def output_format(body: Body, base: str) -> OutputFormat:
    """The format a body requests. Raises InvalidRequest for an invalid combination."""
    if not isinstance(body, PaintBody):
        return OutputFormat(base=None if body.wants_b64() else base)
    if body.background == "transparent" and body.output_format == "jpeg":
        raise InvalidRequest(
            "background: 'transparent' and output_format 'jpeg': a JPEG has no transparency; "
            "request png or webp, or background auto",
            param="background",
        )
    return OutputFormat(
        format=body.output_format or "png",
        compression=100 if body.output_compression is None else body.output_compression,
        opaque=body.background == "opaque",
        quality=QUALITY_NAMES.get(str(body.quality), "medium"),
        base=None if body.wants_b64() or body.stream else base,
    )


async def answer(context: Context, body: Body, event: str = "", **more: Any) -> Response:
    """Draw what a body requests, and answer with the pictures or, if requested, a stream of `event`s.

    `more` holds request fields that override the body's.
    """
    request, service, gallery = context.request, context.service, context.gallery
    form = output_format(body, urls.base_url(request, service.settings))
    keep = keeper(gallery, caller_of(request), form.format, form.encode, required=form.base is not None)
    more |= context.origin | {"keep": keep}
    if isinstance(body, PaintBody) and body.stream:
        job = await unless_gone(request, started_job(service, body, more))
        return Stream(job, _events(job, form, event), body.ignored())
    return await unless_gone(request, _images_response(service, body, more, form, gallery))


async def submit(service: Service, body: Body, more: Mapping[str, Any]) -> Job:
    """Submit the request, so that only the job keeps the source pictures."""
    request = body.to_request(**more)
    body.release_pictures()
    return await service.submit(request)


async def _images_response(
    service: Service, body: Body, more: Mapping[str, Any], form: OutputFormat, gallery: Gallery
) -> Response:
    """OpenAI's images response. All pictures or an error."""
    job = await submit(service, body, more)
    results = await all_pictures(job, gallery)
    content = {"created": int(job.created), "usage": usage(results)} | _format_fields(form, job, results[0])
    items = [await _item(part, form) for part in job.parts]
    return JSONResponse(content | {"data": items}, headers=warning_headers(body.ignored(), results))


async def all_pictures(job: Job, gallery: Gallery) -> list[Done]:
    """The pictures of a job. If it fails or its client disconnects, those that it stored are deleted."""
    async with dropped_if_left(gallery, job):
        return await job.pictures()


async def started_job(service: Service, body: Body, more: Mapping[str, Any]) -> Job:
    """A job that has begun, or waited a moment: an error up to then gets an HTTP status, not a stream event."""
    job = await submit(service, body, more)
    try:
        with suppress(TimeoutError):  # not `wait_for`: Python 3.11's may swallow a cancellation
            async with asyncio.timeout(KEEP_ALIVE_S):
                await job.first_event.wait()
    except asyncio.CancelledError:
        job.leave()
        raise
    if job.error:
        raise job.error
    return job


def _comment() -> str:
    return ": keep-alive\n\n"


class Stream(StreamingResponse):
    """Server-sent events of a job, which is cancelled if its client disconnects; or lines of another kind.

    `alive` gives what is sent when there was nothing for a while.
    """

    def __init__(
        self,
        job: Job,
        events: AsyncGenerator[str, None],
        ignored: Sequence[str],
        media_type: str = "text/event-stream",
        alive: Callable[[], str] = _comment,
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"} | warning_headers(ignored, ())
        super().__init__(_with_keep_alive(events, alive), media_type=media_type, headers=headers)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.leave()  # if the client disconnects at once, `lines` never starts and so never ends


async def _events(job: Job, form: OutputFormat, event: str) -> AsyncGenerator[str, None]:
    """As OpenAI's SDK types them: `event`.partial_image, then `event`.completed."""
    several = len(job.parts) > 1
    previews_sent = [0] * len(job.parts)
    """Previews sent per picture; after a worker's death they come again."""
    completed = 0

    async def sse(kind: str, picture: Done | Preview, index: int, **more: Any) -> str:
        type = f"{event}.{kind}"
        data = {"type": type, "b64_json": await b64(picture, form), "created_at": int(job.created)} | more
        data |= _format_fields(form, job, job.parts[index].done) | ({"index": index} if several else {})
        return f"event: {type}\ndata: {json.dumps(data)}\n\n"

    try:
        async with aclosing(job.events()) as events:
            async for index, happened in events:
                if isinstance(happened, Preview) and happened.index == previews_sent[index]:
                    previews_sent[index] += 1
                    yield await sse("partial_image", happened, index, partial_image_index=happened.index)
                # Completed pictures are sent in order.
                while completed < len(job.parts) and (done := job.parts[completed].done):
                    extra: dict[str, Any] = {"warnings": list(done.warnings)} if done.warnings else {}
                    if name := job.parts[completed].name:
                        extra["name"] = name
                    yield await sse("completed", done, completed, usage=usage([done]), seed=done.recipe.seed, **extra)
                    completed += 1
    except Exception as error:  # the status was already sent, so any error goes into the stream
        yield failure(error)


def failure(error: Exception) -> str:
    """The event for an error on the way."""
    return f"data: {json.dumps(errors.shape(errors.reported(error)))}\n\n"


async def _with_keep_alive(lines: AsyncGenerator[str, None], alive: Callable[[], str] = _comment) -> AsyncIterator[str]:
    async with aclosing(lines):
        following = asyncio.ensure_future(anext(lines))
        try:
            while True:
                done, _ = await asyncio.wait([following], timeout=KEEP_ALIVE_S)
                if not done:
                    yield alive()
                    continue
                try:
                    line = following.result()
                except StopAsyncIteration:
                    return
                following = asyncio.ensure_future(anext(lines))
                yield line
        finally:
            following.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration):
                await following


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; cancels it if the client closes the connection."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Cancelled("the client closed the connection")
    finally:
        for future in (task, disconnect):
            future.cancel()
        await asyncio.wait({task, disconnect})


def usage(results: Sequence[Done]) -> dict[str, Any]:
    """OpenAI's token counts: the encoder's tokens for texts, one per `PATCH` square for pictures."""
    text = sum(done.prompt_tokens for done in results)
    image = sum(_patches(*done.recipe.size) * len(done.recipe.image_sha256) for done in results)
    output = sum(_patches(*done.recipe.size) for done in results)
    return {
        "input_tokens": text + image,
        "input_tokens_details": {"text_tokens": text, "image_tokens": image},
        "output_tokens": output,
        "total_tokens": text + image + output,
    }


def warning_headers(ignored: Sequence[str], results: Iterable[Done]) -> dict[str, str]:
    """Headers for ignored fields, and for where the result differs from the request."""
    warnings = dict.fromkeys(warning for done in results for warning in done.warnings)
    headers = {"x-sfumato-ignored": ", ".join(ignored[:32]), "x-sfumato-warning": "; ".join(warnings)}
    return {name: header_text(value) for name, value in headers.items() if value}


def _format_fields(form: OutputFormat, job: Job, done: Done | None) -> dict[str, str]:
    generation = job.parts[0].generation
    size = done.recipe.size if done else generation.sampling.size
    return {
        "background": "transparent" if generation.transparent else "opaque",
        "output_format": form.format,
        "quality": form.quality,
        "size": f"{size[0]}x{size[1]}" if size else "auto",
    }


def _patches(width: int, height: int) -> int:
    return -(-width // PATCH) * -(-height // PATCH)


async def _item(part: Part, form: OutputFormat) -> dict[str, Any]:
    assert part.done
    seed = part.done.recipe.seed
    if form.base is None:
        return {"b64_json": await b64(part.done, form), "seed": seed}
    return {"url": picture_url(form.base, part.name), "seed": seed}


def picture_url(base: str, name: str | None) -> str:
    """Where the stored picture of that name is."""
    return f"{base}/generated-images/{name}"


async def b64(picture: Done | Preview, form: OutputFormat) -> str:
    """The encoded picture as base64."""
    return base64.b64encode(await encoded(picture, form)).decode()


async def encoded(picture: Done | Preview, form: OutputFormat) -> bytes:
    """The picture's file."""
    return await asyncio.to_thread(form.encode, picture)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
