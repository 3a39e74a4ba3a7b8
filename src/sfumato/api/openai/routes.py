"""OpenAI's Images API, with LocalAI's extra fields: generations, edits, variations."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from sfumato.api.dependencies import TheContext
from sfumato.api.http.documents import DRAWING, STREAMING
from sfumato.api.http.forms import openapi_body, reader
from sfumato.api.openai.answers import answer
from sfumato.api.openai.bodies import EditsBody, GenerationsBody, VariationsBody

routes = APIRouter(tags=["Images"])


@routes.post(
    "/images/generations", summary="Draw pictures", openapi_extra=openapi_body(GenerationsBody), responses=STREAMING
)
async def generations(
    body: Annotated[GenerationsBody, Depends(reader(GenerationsBody))],
    context: TheContext,
) -> Response:
    return await answer(context, body, "image_generation")


@routes.post(
    "/images/edits",
    summary="Edit a picture, completely or in the masked area",
    openapi_extra=openapi_body(EditsBody),
    responses=STREAMING,
)
async def edits(body: Annotated[EditsBody, Depends(reader(EditsBody))], context: TheContext) -> Response:
    return await answer(context, body, "image_edit")


@routes.post(
    "/images/variations",
    summary="Draw variations of a picture",
    openapi_extra=openapi_body(VariationsBody),
    responses=DRAWING,
)
async def variations(
    body: Annotated[VariationsBody, Depends(reader(VariationsBody))],
    context: TheContext,
) -> Response:
    return await answer(context, body)
