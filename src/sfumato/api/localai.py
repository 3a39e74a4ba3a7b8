"""LocalAI's own image routes: inpainting and upscaling."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from pydantic import BeforeValidator, Field

from sfumato.api.dependencies import TheContext
from sfumato.api.http.documents import DRAWING
from sfumato.api.http.forms import described, reader
from sfumato.api.openai.answers import answer
from sfumato.api.openai.bodies import Body, Picture, Pictures
from sfumato.config import ModelConfig
from sfumato.errors import InvalidRequest
from sfumato.serving.planning import ImageRequest

UPSCALERS = ("Upscale", "SuperResolution")
"""Of which one stands in the names of diffusers' classes for it."""


def _number(value: object) -> object:
    """Forms send digits."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


class InpaintingBody(Body):
    """Of `POST /v1/images/inpainting`."""

    prompt: str = Field(description="What to draw where the mask says.", examples=["a cat"])
    image: Pictures = Field(min_length=1, max_length=1, description="The picture: a file, base64, data: URI or URL.")
    mask: Picture = Field(description="Of the same size: transparent, or light if nothing is transparent, is redrawn.")

    def to_request(self, **more: object) -> ImageRequest:
        return super().to_request(prompts=[self.prompt], images=self.image, mask=self.mask, **more)


class UpscaleBody(Body):
    """Of `POST /v1/images/upscale`."""

    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = (*Body.WITHOUT_EFFECT, "size", "strength")

    scale: Annotated[Literal[2, 4], BeforeValidator(_number)] = Field(description="How many times larger on each side.")
    image: Pictures = Field(min_length=1, max_length=1, description="The picture: a file, base64, data: URI or URL.")
    prompt: str = Field("", description="What it shows, for upscalers that take a prompt.")

    def to_request(self, **more: object) -> ImageRequest:
        only = {"prompts": [self.prompt], "images": self.image, "upscale": self.scale, "size": None, "strength": None}
        return super().to_request(**only | more)


routes = APIRouter(tags=["LocalAI"])


@routes.post(
    "/images/inpainting",
    summary="Redraw where a mask says",
    openapi_extra=described(InpaintingBody),
    responses=DRAWING,
)
async def inpainting(
    body: Annotated[InpaintingBody, Depends(reader(InpaintingBody))],
    context: TheContext,
) -> Response:
    return await answer(context, body)


@routes.post("/images/upscale", summary="Enlarge a picture", openapi_extra=described(UpscaleBody), responses=DRAWING)
async def upscale(
    body: Annotated[UpscaleBody, Depends(reader(UpscaleBody))],
    context: TheContext,
) -> Response:
    catalog = context.service.catalog
    catalog.refresh()
    return await answer(context, body, model=body.model or _upscaler(catalog.all()))


def _upscaler(models: list[ModelConfig]) -> str:
    """The first model file that is one. Raises InvalidRequest when there is none."""
    for config in models:
        if any(word in (config.pipeline_type or "") for word in UPSCALERS):
            return config.name
    raise InvalidRequest(
        "model: no model file names an upscaler. Name the model, or add one with `pipeline_type: "
        "StableDiffusionUpscalePipeline` (4 times) or `StableDiffusionLatentUpscalePipeline` (2 times).",
        param="model",
    )
