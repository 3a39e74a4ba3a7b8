"""OpenAI's Images API, with LocalAI's extra fields: generations, edits, variations."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from sfumato.api.http.documents import DRAWING, STREAMING
from sfumato.api.http.forms import described, reader
from sfumato.api.openai.answers import answer
from sfumato.api.openai.bodies import EditsBody, GenerationsBody, VariationsBody
from sfumato.pictures.gallery import Gallery
from sfumato.serving.service import Service


def router(service: Service, gallery: Gallery) -> APIRouter:
    routes = APIRouter(tags=["Images"])

    @routes.post(
        "/images/generations", summary="Draw pictures", openapi_extra=described(GenerationsBody), responses=STREAMING
    )
    async def generations(
        body: Annotated[GenerationsBody, Depends(reader(GenerationsBody))], request: Request
    ) -> Response:
        return await answer(service, gallery, body, request, "image_generation")

    @routes.post(
        "/images/edits",
        summary="Edit a picture, completely or in the masked area",
        openapi_extra=described(EditsBody),
        responses=STREAMING,
    )
    async def edits(body: Annotated[EditsBody, Depends(reader(EditsBody))], request: Request) -> Response:
        return await answer(service, gallery, body, request, "image_edit")

    @routes.post(
        "/images/variations",
        summary="Draw variations of a picture",
        openapi_extra=described(VariationsBody),
        responses=DRAWING,
    )
    async def variations(
        body: Annotated[VariationsBody, Depends(reader(VariationsBody))], request: Request
    ) -> Response:
        return await answer(service, gallery, body, request)

    return routes
