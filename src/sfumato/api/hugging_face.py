"""Hugging Face's inference API, as `huggingface_hub.InferenceClient` speaks it: inputs in, the picture's file out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import model_validator

from sfumato.api.dependencies import Context, TheContext
from sfumato.api.http import documents
from sfumato.api.http.auth import caller_of
from sfumato.api.http.forms import openapi_body, reader
from sfumato.api.keeping import keeper
from sfumato.api.openai import answers
from sfumato.api.openai.bodies import DrawBody
from sfumato.errors import InvalidRequest
from sfumato.pictures.store import MEDIA_TYPES
from sfumato.serving.planning import ImageRequest

PICTURE_BEGINS = re.compile(r"data:image/|iVBORw0KGgo|/9j/|UklGR|R0lGOD|Qk[0-3]")
"""Of base64: PNG, JPEG, WebP, GIF and BMP."""

SHORTEST = 64
"""Characters of a picture in base64. A shorter text is a prompt, whatever it begins with."""


class InferenceBody(DrawBody):
    """Of `POST /models/{id}`: the fields of generations, out of `parameters`."""

    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = (
        *DrawBody.WITHOUT_EFFECT,
        "stream",
        "partial_images",
        "response_format",
    )

    prompt: str = ""

    @model_validator(mode="before")
    @classmethod
    def _flattened(cls, data: Any) -> Any:
        """`inputs` is the picture if there is a prompt beside it, or if it is one by its beginning; else the prompt."""
        if not isinstance(data, dict) or _has_file(data.get("image")):
            return data
        inputs, parameters = data.get("inputs"), data.get("parameters")
        if not isinstance(inputs, str):
            raise InvalidRequest("inputs: must be a text, the prompt, or a picture in base64", param="inputs")
        if not isinstance(parameters, dict | None):
            raise InvalidRequest("parameters: must be an object", param="parameters")
        others = {name: value for name, value in data.items() if name not in ("inputs", "parameters")}
        fields = others | _with_size(parameters or {})
        if fields.get("prompt") is not None or _is_picture(inputs):
            return {**fields, "image": [inputs], "prompt": fields.get("prompt") or ""}
        return {**fields, "prompt": inputs}

    def to_request(self, **more: Any) -> ImageRequest:
        if self.n is not None and self.n > 1:
            raise InvalidRequest(f"n: {self.n}; this API answers with one picture: the file itself", param="n")
        return super().to_request(**{"prompts": [self.prompt], "n": 1, "previews": 0, "detached": False} | more)


def _has_file(image: Any) -> bool:
    """The body was a file, or a form with one: JSON has no bytes."""
    return any(isinstance(each, bytes) for each in (image if isinstance(image, list) else [image]))


def _is_picture(text: str) -> bool:
    return len(text) >= SHORTEST and bool(PICTURE_BEGINS.match(text))


def _with_size(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`width` and `height`, or `target_size` of image-to-image, as `size`. Raises InvalidRequest for one alone."""
    fields = dict(parameters)
    target = fields.pop("target_size", None)
    sides = target if isinstance(target, dict) else fields
    width, height = (sides.get(side) for side in ("width", "height"))
    fields.pop("width", None)
    fields.pop("height", None)
    if (width, height) == (None, None):
        return fields
    if type(width) is not int or type(height) is not int:
        name = "target_size" if sides is target else "height" if type(width) is int else "width"
        raise InvalidRequest(f"{name}: send both width and height, as whole numbers of pixels", param=name)
    return {**fields, "size": f"{width}x{height}"}


def _openapi() -> dict[str, Any]:
    """The request's description: `parameters` has the fields of generations."""
    fields = openapi_body(DrawBody)["requestBody"]["content"]["application/json"]["schema"]
    fields["properties"] |= {
        "prompt": {"type": "string", "description": "With a picture in `inputs`: what to make of it."},
        "width": {"type": "integer", "description": "Pixels; needs `height`."},
        "height": {"type": "integer", "description": "Pixels; needs `width`."},
        "target_size": {"type": "object", "description": "`{width, height}` of image-to-image."},
    }
    inputs = {"type": "string", "description": "The prompt; or a picture in base64 for image-to-image."}
    schema = {"type": "object", "required": ["inputs"], "properties": {"inputs": inputs, "parameters": fields}}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


routes = APIRouter(tags=["Hugging Face"])


@routes.post("/", include_in_schema=False)
async def of_default_model(
    body: Annotated[InferenceBody, Depends(reader(InferenceBody, picture="image"))], context: TheContext
) -> Response:
    """`InferenceClient(base_url="http://localhost:8080")` posts to just that."""
    return await _answer(context, body, body.model)


@routes.post(
    "/models/{id:path}",
    summary="Draw a picture, and answer with its file",
    description="The body may also be the file of a picture, for image-to-image without parameters. The header "
    "`accept` chooses the format, unless `output_format` does.",
    openapi_extra=_openapi(),
    response_class=Response,
    responses={
        200: {
            "description": "The picture",
            "content": {media: {"schema": {"type": "string", "format": "binary"}} for media in MEDIA_TYPES.values()},
        },
        **documents.ACCEPTED,
        **documents.errors(*documents.REASONS, model=documents.ErrorText),
    },
)
async def inference(
    id: str, body: Annotated[InferenceBody, Depends(reader(InferenceBody, picture="image"))], context: TheContext
) -> Response:
    return await _answer(context, body, id)


async def _answer(context: Context, body: InferenceBody, model: str | None) -> Response:
    request, service, gallery = context.request, context.service, context.gallery
    body.output_format = body.output_format or _accepted(request)
    output = answers.output_format(body, "")
    keep = keeper(gallery, caller_of(request), output.format, output.encode, required=False)
    more = context.origin | {"model": model, "keep": keep}

    async def draw() -> Response:
        job = await answers.submit(service, body, more)
        (done,) = await answers.all_pictures(job, gallery)
        headers = answers.warning_headers(body.ignored(), [done])
        return Response(await answers.encoded(done, output), media_type=MEDIA_TYPES[output.format], headers=headers)

    return await answers.unless_gone(request, draw())


def _accepted(request: Request) -> Any:
    """The first format that the client accepts by name; png if it names none."""
    named = (each.partition(";")[0].strip() for each in request.headers.get("accept", "").lower().split(","))
    formats = {media: format for format, media in MEDIA_TYPES.items()} | {"image/jpg": "jpeg"}
    return next((formats[each] for each in named if each in formats), "png")
