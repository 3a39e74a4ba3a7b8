"""The tools: requests as the image routes read and draw them, and answers without a word of the protocol."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from pydantic import ValidationError
from starlette.requests import Request

from sfumato.api import models as model_routes
from sfumato.api import progress as progress_routes
from sfumato.api.http import errors, urls
from sfumato.api.http.auth import caller_of
from sfumato.api.keeping import dropped_if_left, keeper
from sfumato.api.mcp import schemas
from sfumato.api.openai.answers import OutputFormat, output_format, picture_url, submit
from sfumato.api.openai.bodies import EditsBody, GenerationsBody, PaintBody
from sfumato.core import Done, Step
from sfumato.errors import InvalidRequest
from sfumato.formats import IMAGE
from sfumato.pictures import recipe
from sfumato.pictures.gallery import Gallery
from sfumato.pictures.store import MEDIA_TYPES
from sfumato.serving.job import Job
from sfumato.serving.service import Service

Report: TypeAlias = Callable[[float, float, str], Awaitable[None]]
"""Tells the client of progress: steps done, all steps, and a sentence."""

SHOWN_OF_MODELS = ("status", "description", "aliases", "tasks", "defaults", "limits")


@dataclass(frozen=True, slots=True)
class Call:
    """Of a tool: who calls, and what it stands on."""

    request: Request
    service: Service
    gallery: Gallery
    report: Report

    @property
    def base(self) -> str:
        return urls.base_url(self.request, self.service.settings)

    @property
    def owner(self) -> str | None:
        """As `dependencies.Owner`."""
        return caller_of(self.request) if self.service.settings.api_keys else None


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture in an answer."""

    media_type: str
    data: str | None
    """Base64, at most the setting mcp_max_side; None: only its link."""
    url: str | None
    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Answer:
    value: dict[str, Any]
    """What a program reads, and a model as JSON."""
    pictures: list[Shown] = field(default_factory=list)

    @property
    def text(self) -> str:
        return json.dumps(self.value, ensure_ascii=False)


Run: TypeAlias = Callable[[Call, dict[str, Any]], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class Tool:
    title: str
    description: str
    schema: dict[str, Any]
    run: Run
    reads: bool = False
    """Whether it changes nothing."""


async def generate_image(call: Call, arguments: dict[str, Any]) -> Answer:
    return await _draw(call, GenerationsBody, arguments)


async def edit_image(call: Call, arguments: dict[str, Any]) -> Answer:
    return await _draw(call, EditsBody, arguments)


async def list_models(call: Call, arguments: dict[str, Any]) -> Answer:
    listed = await model_routes.models(service=call.service, output_modalities=IMAGE)
    shown = [
        {"name": model["id"]} | {key: model["sfumato"][key] for key in SHOWN_OF_MODELS} for model in listed["data"]
    ]
    return Answer({"models": shown})


async def get_progress(call: Call, arguments: dict[str, Any]) -> Answer:
    id = arguments.get("id")
    if id is not None and not isinstance(id, str):
        raise InvalidRequest("id: must be a text, the id of a request", param="id")
    if id:
        found = [await progress_routes.progress(id=id, service=call.service, owner=call.owner)]
    else:
        found = (await progress_routes.several(service=call.service, owner=call.owner))["data"]
    for each in found:
        each["kept"] = [kept | {"url": picture_url(call.base, kept["name"])} for kept in each["kept"]]
    return Answer({"requests": found})


async def _draw(call: Call, kind: type[PaintBody], arguments: dict[str, Any]) -> Answer:
    arguments = dict(arguments)
    wait = arguments.pop("wait", True)
    if not isinstance(wait, bool):
        raise InvalidRequest(f"wait: {wait!r:.40}; true and false are valid", param="wait")
    body = await asyncio.to_thread(_body, kind, arguments)
    form, ignored = output_format(body, call.base), body.ignored()
    # Its link is part of the answer, as a URL is on the other routes, unless the request wants none.
    linked = body.response_format != "b64_json" or not wait
    keep = keeper(call.gallery, caller_of(call.request), form.format, form.encode, required=linked)
    more = {"caller": caller_of(call.request), "id": call.request.state.request_id, "keep": keep}
    job = await submit(call.service, body, more if wait else more | {"detached": True})
    if not wait:
        return Answer({"id": job.id, "model": job.config.name, "ignored": ignored})
    results = await _followed(job, call)
    pictures = [await _shown(call, form, part.name, done) for part, done in zip(job.parts, results, strict=True)]
    drawn = [
        {"url": shown.url, "seed": done.recipe.seed, "width": done.recipe.size[0], "height": done.recipe.size[1]}
        for shown, done in zip(pictures, results, strict=True)
    ]
    warnings = list(dict.fromkeys(warning for done in results for warning in done.warnings))
    value = {"id": job.id, "model": job.config.name, "pictures": drawn, "warnings": warnings, "ignored": ignored}
    return Answer(value, pictures)


def _body(kind: type[PaintBody], arguments: dict[str, Any]) -> PaintBody:
    """Raises InvalidRequest naming the argument."""
    arguments = {name: value for name, value in arguments.items() if name not in ("stream", "partial_images")}
    try:
        return kind.model_validate(arguments)
    except ValidationError as error:
        problems = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
        raise errors.invalid(problems) from None


async def _followed(job: Job, call: Call) -> list[Done]:
    """All its pictures; steps are reported meanwhile. If the call is cancelled, so is the job."""
    reported = 0
    async with dropped_if_left(call.gallery, job), aclosing(job.events()) as events:
        async for _, event in events:
            now = job.progress()
            # After a worker's death steps are done again, and progress must not go back.
            if isinstance(event, Step) and now.step > reported:
                reported = now.step
                await call.report(now.step, now.total, f"step {now.step} of {now.total}")
    return await job.pictures()


async def _shown(call: Call, form: OutputFormat, name: str | None, done: Done) -> Shown:
    side, (width, height) = call.service.settings.mcp_max_side, done.recipe.size
    scale = min(1.0, side / max(width, height, 1))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    whole = await asyncio.to_thread(form.encode, done)
    small = whole
    if side and scale < 1:
        small = await asyncio.to_thread(
            recipe.convert, done.file, form.format, form.compression, opaque=form.opaque, size=size
        )
    return Shown(
        media_type=MEDIA_TYPES[form.format],
        data=base64.b64encode(small).decode() if side else None,
        url=picture_url(call.base, name) if name else None,
        name=name or "",
        bytes=len(whole),
    )


TOOLS: Mapping[str, Tool] = MappingProxyType(
    {
        "generate_image": Tool(
            "Draw a picture",
            "Draw one or more pictures from a text. The answer has each picture and a link to it.",
            schemas.GENERATE,
            generate_image,
        ),
        "edit_image": Tool(
            "Edit a picture",
            "Draw from a picture, completely or where a mask is transparent. For models whose tasks (list_models) "
            "include image-to-image or inpainting.",
            schemas.EDIT,
            edit_image,
        ),
        "list_models": Tool(
            "List the models",
            "The models that draw, with their tasks, defaults and limits.",
            schemas.NOTHING,
            list_models,
            reads=True,
        ),
        "get_progress": Tool(
            "Look how far requests are",
            "Progress of a request by its id, also for a while after it ended, with links to its finished pictures; "
            "without an id, of all that are queued or drawn.",
            schemas.PROGRESS,
            get_progress,
            reads=True,
        ),
    }
)
