"""The gallery over HTTP: the pictures of the caller's key, or all pictures if there are no keys."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from sfumato.api import said
from sfumato.api.http import documents
from sfumato.api.http.auth import caller_of
from sfumato.api.http.forms import described, reader
from sfumato.api.openai.bodies import Picture
from sfumato.errors import InvalidRequest, PictureNotFound
from sfumato.pictures.gallery import MAX_PAGE, Gallery, Kept, Wanted
from sfumato.pictures.images import from_text
from sfumato.serving.service import Service

MAX_WORDS = 500
"""Maximum characters of a search."""

THUMBNAIL = 320
"""Longer side in pixels."""

Name = Annotated[str, Path(description="Name in the gallery, or the last part of a picture's URL.")]


class GalleryPicture(BaseModel):
    """One generated picture; `recipe` is null for a file without one."""

    name: str = Field(description="The picture is at /generated-images/{name}.")
    object: str
    created: float = Field(description="Seconds since 1970.")
    model: str
    starred: bool
    recipe: dict[str, Any] | None = Field(description="The complete recipe embedded in the file.")


class GalleryPage(BaseModel):
    """One page of pictures, newest first."""

    object: str
    data: list[GalleryPicture]
    has_more: bool
    next: str | None = Field(description="Value of `before` for the next page.")
    total: int | None = Field(description="Number of all matching pictures; only on the first page.")


class RecipeBody(BaseModel):
    """Of `POST /v1/images/recipe`."""

    image: Picture = Field(description="PNG, JPEG or WebP: base64 or a data: URI; in a form, a file.")


class FileRecipe(BaseModel):
    """The generation parameters in a picture file."""

    object: str
    source: str = Field(description="The program that wrote it: sfumato, automatic1111, invokeai or comfyui.")
    recipe: dict[str, Any] = Field(
        description="Request fields, as far as the file has them: model, prompt, negative_prompt, width, height, "
        "steps, guidance_scale, seed, scheduler, clip_skip, strength."
    )
    warnings: list[str] = Field(description="Parameters that could not be used.")


class StarBody(BaseModel):
    """Of `PATCH /v1/images/gallery/{name}`."""

    model_config = ConfigDict(extra="forbid")

    starred: bool = Field(description="Whether it has a star: it can be listed by that, and does not expire by age.")


def router(service: Service, gallery: Gallery) -> APIRouter:
    routes = APIRouter(tags=["Gallery"])

    def owner(request: Request) -> str | None:
        return caller_of(request) if service.settings.api_keys else None

    async def found(name: str, request: Request) -> Kept:
        kept = await asyncio.to_thread(gallery.get, name, owner(request))
        if kept is None:
            raise PictureNotFound(
                f"you have no picture {name[:100]!r}; it may have expired. GET /v1/images/gallery lists yours.",
                param="name",
            )
        return kept

    @routes.get(
        "/images/gallery",
        summary="Generated pictures, newest first",
        response_model=GalleryPage,
        responses=documents.errors(400, 401, 403, 507),
    )
    async def page(
        request: Request,
        q: Annotated[str, Query(max_length=MAX_WORDS, description="Words that its prompts must contain.")] = "",
        model: Annotated[str | None, Query(max_length=MAX_WORDS, description="Made by this model.")] = None,
        starred: Annotated[bool, Query(description="Only pictures with a star.")] = False,
        before: Annotated[str | None, Query(max_length=100, description="`next` of the previous page.")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Pictures per page.")] = 60,
    ) -> dict[str, Any]:
        wanted = Wanted(owner(request), q, model, starred)
        place = _place(before)
        kept, more = await asyncio.to_thread(gallery.page, wanted, before=place, limit=limit)
        total = await asyncio.to_thread(gallery.count, wanted) if place is None else None
        following = f"{kept[-1].created!r}_{kept[-1].name}" if more and kept else None
        shown = [_shown(each) for each in kept]
        return {"object": "list", "data": shown, "has_more": following is not None, "next": following, "total": total}

    @routes.get(
        "/images/gallery/{name}",
        summary="One picture, with its recipe",
        response_model=GalleryPicture,
        responses=documents.errors(401, 403, 404),
    )
    async def one(name: Name, request: Request) -> dict[str, Any]:
        return _shown(await found(name, request))

    @routes.patch(
        "/images/gallery/{name}",
        summary="Add or remove the star of a picture",
        openapi_extra=described(StarBody),
        response_model=GalleryPicture,
        responses=documents.errors(400, 401, 403, 404, 413, 415),
    )
    async def star(
        name: Name, body: Annotated[StarBody, Depends(reader(StarBody))], request: Request
    ) -> dict[str, Any]:
        await found(name, request)
        await asyncio.to_thread(gallery.star, name, body.starred, owner(request))
        return _shown(await found(name, request))

    @routes.delete(
        "/images/gallery/{name}",
        summary="Delete a picture and its file",
        response_model=GalleryPicture,
        responses=documents.errors(401, 403, 404),
    )
    async def delete(name: Name, request: Request) -> dict[str, Any]:
        kept = await found(name, request)
        await asyncio.to_thread(gallery.delete, name)
        return _shown(kept)

    @routes.post(
        "/images/recipe",
        summary="Read the generation parameters of a picture file",
        openapi_extra=described(RecipeBody),
        response_model=FileRecipe,
        responses=documents.errors(400, 401, 403, 413, 415, 429),
    )
    async def read(body: Annotated[RecipeBody, Depends(reader(RecipeBody))]) -> dict[str, Any]:
        image = body.image
        if isinstance(image, str):
            image = await asyncio.to_thread(from_text, image, "image")
        found = said.read(await service.texts(image))
        return {"object": "recipe", "source": found.source, "recipe": found.fields, "warnings": list(found.warnings)}

    return routes


def pictures(gallery: Gallery) -> APIRouter:
    """Routes next to the pictures themselves; like them they need no key, only a name that cannot be guessed."""
    routes = APIRouter(tags=["Gallery"])

    @routes.get(
        "/generated-images/{name}/thumbnail",
        summary=f"A generated picture, at most {THUMBNAIL} pixels per side",
        response_class=Response,
        responses={200: {"content": {"image/webp": {}}}, **documents.errors(404)},
    )
    async def thumbnail(name: Name) -> Response:
        data = await asyncio.to_thread(gallery.thumbnail, name, THUMBNAIL)
        if data is None:
            raise PictureNotFound("there is no such picture; it may have expired", param="name")
        return Response(data, media_type="image/webp", headers={"cache-control": "public, max-age=604800, immutable"})

    return routes


def _shown(kept: Kept) -> dict[str, Any]:
    return {"object": "gallery.picture"} | asdict(kept)


def _place(before: str | None) -> tuple[float, str] | None:
    if not before:
        return None
    created, _, name = before.partition("_")
    try:
        time = float(created)
        if time == time and abs(time) < 1e12 and name.isprintable():
            return time, name
    except ValueError:
        pass
    raise InvalidRequest(f"before: {before[:100]!r}; send the `next` of the previous page", param="before")
