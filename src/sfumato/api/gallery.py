"""The gallery over HTTP: the pictures of the caller's key, or all pictures if there are no keys."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from sfumato.api import file_parameters
from sfumato.api.dependencies import Owner, TheGallery, TheService
from sfumato.api.fields import PLAIN
from sfumato.api.http import documents
from sfumato.api.http.forms import openapi_body, reader
from sfumato.api.openai.pictures import Picture
from sfumato.errors import InvalidRequest, PictureNotFound
from sfumato.pictures.gallery import MAX_PAGE, Gallery, GalleryEntry, GalleryQuery
from sfumato.sampling import NAMED

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

    model_config = ConfigDict(extra="forbid")

    image: Picture = Field(description="PNG, JPEG or WebP: base64 or a data: URI; in a form, a file.")


class FileRecipe(BaseModel):
    """The generation parameters in a picture file."""

    object: str
    source: str = Field(description="The program that wrote it: sfumato, automatic1111, invokeai or comfyui.")
    recipe: dict[str, Any] = Field(
        description=f"Request fields, as far as the file has them: model, prompt, seed, {', '.join(NAMED)}."
    )
    warnings: list[str] = Field(description="Parameters that could not be used.")


class StarBody(BaseModel):
    """Of `PATCH /v1/images/gallery/{name}`."""

    model_config = ConfigDict(extra="forbid")

    starred: bool = Field(description="Whether it has a star: it can be listed by that, and does not expire by age.")


routes = APIRouter(tags=["Gallery"])


@routes.get(
    "/images/gallery",
    summary="Generated pictures, newest first",
    response_model=GalleryPage,
    responses=documents.errors(400, 401, 403, 507),
)
async def page(
    gallery: TheGallery,
    owner: Owner,
    q: Annotated[str, Query(max_length=MAX_WORDS, description="Words that its prompts must contain.")] = "",
    model: Annotated[str | None, Query(max_length=MAX_WORDS, description="Made by this model.")] = None,
    starred: Annotated[bool, Query(description="Only pictures with a star.")] = False,
    before: Annotated[str | None, Query(max_length=100, description="`next` of the previous page.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Pictures per page."), PLAIN] = 60,
) -> dict[str, Any]:
    query = GalleryQuery(owner, q, model, starred)
    place = _place(before)
    entries, more = await asyncio.to_thread(gallery.page, query, before=place, limit=limit)
    total = await asyncio.to_thread(gallery.count, query) if place is None else None
    following = f"{entries[-1].created!r}_{entries[-1].name}" if more and entries else None
    data = [_picture_json(each) for each in entries]
    return {"object": "list", "data": data, "has_more": following is not None, "next": following, "total": total}


@routes.get(
    "/images/gallery/{name}",
    summary="One picture, with its recipe",
    response_model=GalleryPicture,
    responses=documents.errors(401, 403, 404),
)
async def one(name: Name, gallery: TheGallery, owner: Owner) -> dict[str, Any]:
    return _picture_json(await _require_entry(gallery, name, owner))


@routes.patch(
    "/images/gallery/{name}",
    summary="Add or remove the star of a picture",
    openapi_extra=openapi_body(StarBody),
    response_model=GalleryPicture,
    responses=documents.errors(400, 401, 403, 404, 413, 415),
)
async def star(
    name: Name, body: Annotated[StarBody, Depends(reader(StarBody))], gallery: TheGallery, owner: Owner
) -> dict[str, Any]:
    await _require_entry(gallery, name, owner)
    await asyncio.to_thread(gallery.star, name, body.starred, owner)
    return _picture_json(await _require_entry(gallery, name, owner))


@routes.delete(
    "/images/gallery/{name}",
    summary="Delete a picture and its file",
    response_model=GalleryPicture,
    responses=documents.errors(401, 403, 404),
)
async def delete(name: Name, gallery: TheGallery, owner: Owner) -> dict[str, Any]:
    entry = await _require_entry(gallery, name, owner)
    await asyncio.to_thread(gallery.delete, name)
    return _picture_json(entry)


@routes.post(
    "/images/recipe",
    summary="Read the generation parameters of a picture file",
    openapi_extra=openapi_body(RecipeBody),
    response_model=FileRecipe,
    responses=documents.errors(400, 401, 403, 413, 415, 429),
)
async def read(body: Annotated[RecipeBody, Depends(reader(RecipeBody))], service: TheService) -> dict[str, Any]:
    parsed = file_parameters.read(await service.texts(body.image))
    return {
        "object": "recipe",
        "source": parsed.source,
        "recipe": parsed.fields,
        "warnings": list(parsed.warnings),
    }


pictures = APIRouter(tags=["Gallery"])
"""Routes below the pictures' own URLs. Like them they need no key, as the names cannot be guessed."""


@pictures.get(
    "/generated-images/{name}/thumbnail",
    summary=f"A generated picture, at most {THUMBNAIL} pixels per side",
    response_class=Response,
    responses={200: {"content": {"image/webp": {}}}, **documents.errors(404)},
)
async def thumbnail(name: Name, gallery: TheGallery) -> Response:
    data = await asyncio.to_thread(gallery.thumbnail, name, THUMBNAIL)
    if data is None:
        raise PictureNotFound("there is no such picture; it may have expired", param="name")
    return Response(data, media_type="image/webp", headers={"cache-control": "public, max-age=604800, immutable"})


async def _require_entry(gallery: Gallery, name: str, owner: str | None) -> GalleryEntry:
    """Raises PictureNotFound."""
    entry = await asyncio.to_thread(gallery.get, name, owner)
    if entry is None:
        raise PictureNotFound(
            f"there is no picture {name[:100]!r} of yours; it may have expired. GET /v1/images/gallery lists them.",
            param="name",
        )
    return entry


def _picture_json(entry: GalleryEntry) -> dict[str, Any]:
    return {"object": "gallery.picture"} | asdict(entry)


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
