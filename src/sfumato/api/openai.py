"""OpenAI's Images and Models API, with LocalAI's extra fields."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from sfumato.core import Done
from sfumato.errors import Cancelled
from sfumato.service import ImageRequest, Service
from sfumato.store import Store

T = TypeVar("T")

GPT_STYLE_FIELDS = ("background", "output_format", "output_compression", "moderation")
GPT_QUALITIES = ("auto", "low", "medium", "high")


class GenerationsBody(BaseModel):
    """Body of `POST /v1/images/generations`. Fields that are not listed are ignored and named in a header."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    prompt: str | list[str] = Field(
        description="What to draw; `positive|negative` in one text works too.", examples=["a rocket on blue"]
    )
    model: str | None = Field(None, description="A name from /v1/models; the default model when absent.")
    n: int | None = Field(None, description="Pictures to draw, 1 to 10; picture i has seed + i.")
    size: str | None = Field(None, description="WIDTHxHEIGHT or auto.", examples=["512x512"])
    response_format: Literal["url", "b64_json"] | None = None
    user: str | None = None
    quality: str | int | None = Field(None, description="A number means steps.")
    negative_prompt: str | None = None
    steps: int | None = Field(None, validation_alias=AliasChoices("steps", "step", "num_inference_steps"))
    guidance_scale: float | None = Field(
        None, validation_alias=AliasChoices("guidance_scale", "cfg_scale"), description="0 to 100."
    )
    seed: int | None = Field(None, description="0 to 2**63 - 1; -1 or absent: random. The answer carries it.")
    scheduler: str | None = Field(
        None, validation_alias=AliasChoices("scheduler", "sampler", "scheduler_type"), examples=["k_dpmpp_2m"]
    )
    clip_skip: int | None = None
    strength: float | None = Field(None, description="0 to 1: how far to leave the source picture.")
    image: str | list[str] | None = Field(None, description="Base64, data: URI or http(s) URL.")
    file: str | None = Field(None, description="The same as image.")
    files: list[str] | None = None
    ref_images: list[str] | None = None
    mask: str | None = Field(None, description="White (or transparent) is redrawn.")

    def ignored(self) -> list[str]:
        """Fields that were sent and change nothing."""
        names = list(self.model_extra or {})
        if self.quality is not None and self._quality_steps() is None:
            names.append("quality")
        return names

    def _quality_steps(self) -> int | None:
        text = str(self.quality or "")
        return int(text) if text.isdigit() else None

    def to_request(self, caller: str) -> ImageRequest:
        image = [self.image] if isinstance(self.image, str) else list(self.image or ())
        return ImageRequest(
            prompts=[self.prompt] if isinstance(self.prompt, str) else self.prompt,
            model=self.model or None,
            negative_prompt=self.negative_prompt,
            n=self.n,
            size=self.size,
            steps=self.steps if self.steps is not None else self._quality_steps(),
            guidance_scale=self.guidance_scale,
            seed=self.seed,
            scheduler=self.scheduler,
            clip_skip=self.clip_skip,
            strength=self.strength,
            images=[
                *image,
                *([self.file] if self.file else ()),
                *(self.files or ()),
                *(self.ref_images or ()),
            ],
            mask=self.mask,
            caller=caller,
        )

    def wants_b64(self) -> bool:
        """As asked; absent: a URL, but for requests in gpt-image style, whose clients expect base64."""
        if self.response_format:
            return self.response_format == "b64_json"
        return (
            (self.model or "").startswith("gpt-image")
            or any(name in (self.model_extra or {}) for name in GPT_STYLE_FIELDS)
            or self.quality in GPT_QUALITIES
        )


def router(service: Service, store: Store) -> APIRouter:
    routes = APIRouter()

    @routes.post("/images/generations", summary="Draw pictures")
    async def generations(body: GenerationsBody, request: Request) -> Response:
        caller = request.client.host if request.client else ""
        drawn = await _unless_gone(request, service.draw(body.to_request(caller)))
        base = service.settings.public_url.rstrip("/") or str(request.base_url).rstrip("/")
        items = [await _item(done, store, None if body.wants_b64() else base) for done in drawn]
        ignored = body.ignored()
        headers = {"x-sfumato-ignored": ", ".join(_ascii(ignored))} if ignored else {}
        return JSONResponse({"created": int(time.time()), "data": items}, headers=headers)

    @routes.get("/models", summary="The models that can be asked for")
    async def models() -> dict[str, Any]:
        service.catalog.refresh()
        data = []
        for config in service.catalog.all():
            status = service.engine.status(config.name)
            data.append(
                {
                    "id": config.name,
                    "object": "model",
                    "created": config.created,
                    "owned_by": "sfumato",
                    "sfumato": {
                        "status": status.state,
                        "detail": status.detail,
                        "progress": status.progress,
                        "aliases": list(config.aliases),
                    },
                }
            )
        return {"object": "list", "data": data}

    return routes


async def _item(done: Done, store: Store, base: str | None) -> dict[str, Any]:
    if base is None:
        return {"b64_json": base64.b64encode(done.png).decode(), "seed": done.recipe.seed}
    name = await asyncio.to_thread(store.put, done.png)
    return {"url": f"{base}/generated-images/{name}", "seed": done.recipe.seed}


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client closes the connection."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Cancelled("the client closed the connection")
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.wait({task, gone})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _ascii(names: Sequence[str]) -> list[str]:
    return [name.encode("ascii", "backslashreplace").decode().replace("\n", "\\n")[:64] for name in names[:32]]
