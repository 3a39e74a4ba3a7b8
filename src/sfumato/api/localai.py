"""LocalAI's own image routes: inpainting and upscaling."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from pydantic import BeforeValidator, Field

from sfumato.api.dependencies import TheContext
from sfumato.api.http.documents import DRAWING
from sfumato.api.http.forms import openapi_body, reader
from sfumato.api.openai.answers import answer
from sfumato.api.openai.bodies import Body
from sfumato.api.openai.pictures import Picture, Pictures
from sfumato.config import ModelConfig
from sfumato.errors import InvalidRequest
from sfumato.sampling import Sampling
from sfumato.serving.planning import ImageRequest

UPSCALERS = ("Upscale", "SuperResolution")
"""diffusers' class names for upscaling contain one of these."""


def _number(value: object) -> object:
    """Forms send numbers as text."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


class InpaintingBody(Body):
    """Of `POST /v1/images/inpainting`."""

    prompt: str = Field(description="What to draw in the masked area.", examples=["a cat"])
    image: Pictures = Field(min_length=1, max_length=1, description="The picture: a file, base64, data: URI or URL.")
    mask: Picture = Field(
        description="A mask of the same size: transparent (or, without transparency, light) areas are redrawn."
    )

    def to_request(self, **more: object) -> ImageRequest:
        return super().to_request(prompts=[self.prompt], images=self.image, mask=self.mask, **more)


class UpscaleBody(Body):
    """Of `POST /v1/images/upscale`."""

    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = (*Body.WITHOUT_EFFECT, "size", "strength")

    scale: Annotated[Literal[2, 4], BeforeValidator(_number)] = Field(description="Upscaling factor of each side.")
    image: Pictures = Field(min_length=1, max_length=1, description="The picture: a file, base64, data: URI or URL.")
    prompt: str = Field("", description="What the picture shows, for upscalers that take a prompt.")

    def to_request(self, **more: object) -> ImageRequest:
        only = {"prompts": [self.prompt], "images": self.image, "upscale": self.scale}
        return super().to_request(**only | more)

    def sampling(self) -> Sampling:
        return Body.sampling(self.model_copy(update={"size": None, "strength": None}))


routes = APIRouter(tags=["LocalAI"])


@routes.post(
    "/images/inpainting",
    summary="Redraw the masked area of a picture",
    openapi_extra=openapi_body(InpaintingBody),
    responses=DRAWING,
)
async def inpainting(
    body: Annotated[InpaintingBody, Depends(reader(InpaintingBody))],
    context: TheContext,
) -> Response:
    return await answer(context, body)


@routes.post("/images/upscale", summary="Upscale a picture", openapi_extra=openapi_body(UpscaleBody), responses=DRAWING)
async def upscale(
    body: Annotated[UpscaleBody, Depends(reader(UpscaleBody))],
    context: TheContext,
) -> Response:
    catalog = context.service.catalog
    catalog.refresh()
    return await answer(context, body, model=body.model or _upscaler(catalog.all()))


def _upscaler(models: list[ModelConfig]) -> str:
    """The first model that is an upscaler. Raises InvalidRequest if there is none."""
    for config in models:
        if any(word in (config.pipeline_type or "") for word in UPSCALERS):
            return config.name
    raise InvalidRequest(
        "model: there is no upscaler. Set `model`, or add a model file with `pipeline_type: "
        "StableDiffusionUpscalePipeline` (4 times) or `StableDiffusionLatentUpscalePipeline` (2 times).",
        param="model",
    )
