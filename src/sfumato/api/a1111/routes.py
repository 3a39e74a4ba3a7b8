"""The part of AUTOMATIC1111's API that its clients use: drawing, progress, interruption.

It has no job ids: everything refers to the caller's own requests (`auth.caller_of`).
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from starlette.responses import JSONResponse

from sfumato.api.a1111 import answers as shapes
from sfumato.api.a1111 import control_units, lists
from sfumato.api.a1111.bodies import DrawBody, Img2ImgBody, PngInfoBody, Txt2ImgBody, UpscaleBody
from sfumato.api.a1111.jobs import Jobs, TheJobs, request_of
from sfumato.api.a1111.lists import Choices, TheChoices
from sfumato.api.dependencies import Caller, Context, TheContext, TheService
from sfumato.api.http import documents, urls
from sfumato.api.http.auth import caller_of
from sfumato.api.http.forms import openapi_json, reader
from sfumato.api.keeping import keeper
from sfumato.api.openai import answers
from sfumato.core import StorePicture
from sfumato.errors import InvalidRequest, in_words
from sfumato.pictures import recipe
from sfumato.pictures.sources import bytes_or_url
from sfumato.serving.job import Job
from sfumato.serving.planning import ImageRequest
from sfumato.serving.service import Service

ERRORS = documents.ACCEPTED | documents.errors(*documents.REASONS)
UPSCALE_ERRORS = {status: response for status, response in ERRORS.items() if status not in (404, 507)}


routes = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])


@routes.post(
    "/txt2img",
    summary="Draw pictures",
    openapi_extra=openapi_json(Txt2ImgBody),
    responses={**ERRORS, 200: {"model": shapes.Drawn}},
)
async def txt2img(
    body: Annotated[Txt2ImgBody, Depends(reader(Txt2ImgBody))], context: TheContext, choices: TheChoices, jobs: TheJobs
) -> JSONResponse:
    drawing = _draw(context, choices, jobs, body, "txt2img")
    return await answers.unless_gone(context.request, drawing)


@routes.post(
    "/img2img",
    summary="Draw from a picture, or redraw where the mask is white",
    openapi_extra=openapi_json(Img2ImgBody),
    responses={**ERRORS, 200: {"model": shapes.Drawn}},
)
async def img2img(
    body: Annotated[Img2ImgBody, Depends(reader(Img2ImgBody))], context: TheContext, choices: TheChoices, jobs: TheJobs
) -> JSONResponse:
    drawing = _draw(context, choices, jobs, body, "img2img")
    return await answers.unless_gone(context.request, drawing)


@routes.post(
    "/extra-single-image",
    summary="Upscale a picture with an upscaling model",
    openapi_extra=openapi_json(UpscaleBody),
    responses={**UPSCALE_ERRORS, 200: {"model": shapes.Upscaled}},
)
async def upscale(
    body: Annotated[UpscaleBody, Depends(reader(UpscaleBody))],
    context: TheContext,
    jobs: TheJobs,
) -> JSONResponse:
    request = context.request
    model = _upscaler(context.service, body.upscaler_1)
    picture = await asyncio.to_thread(bytes_or_url, body.image, "image")
    body.image = ""
    image_request = ImageRequest(
        prompts=[""],
        model=model,
        n=1,
        images=[picture],
        upscale=_scale(body.upscaling_resize),
        crop=True,
        priority=body.priority,
        **context.origin,
        keep=_store_callback(context, required=False),
    )
    _, results = await answers.unless_gone(request, jobs.draw(image_request, "extras", []))
    answer = {"image": _base64(results[0].file), "html_info": ""}
    return JSONResponse(answer, headers=answers.warning_headers(body.ignored(), results))


@routes.post(
    "/png-info",
    summary="The generation parameters in a picture",
    openapi_extra=openapi_json(PngInfoBody),
    response_model=shapes.PngInfo,
    responses=documents.errors(400, 401, 403, 413, 415, 429),
)
async def png_info(
    body: Annotated[PngInfoBody, Depends(reader(PngInfoBody))],
    request: Request,
    response: Response,
    service: TheService,
) -> dict[str, Any]:
    picture = await asyncio.to_thread(bytes_or_url, body.image, "image")
    body.image = ""
    items = await answers.unless_gone(request, service.texts(picture))
    info = items.pop(recipe.INFOTEXT_CHUNK, "")
    response.headers.update(answers.warning_headers(body.ignored(), ()))
    return {"info": info, "items": items, "parameters": recipe.parse(info) if info else {}}


@routes.get(
    "/progress",
    summary="Progress of the caller's requests on these routes",
    response_model=shapes.ProgressAnswer,
    responses=documents.errors(400, 401, 403),
)
async def progress(jobs: TheJobs, caller: Caller, skip_current_image: bool = False) -> dict[str, Any]:
    running = jobs.of(caller)
    picture = None if skip_current_image else await asyncio.to_thread(_current_image, running)
    return _progress(running, jobs.names, picture)


@routes.post(
    "/interrupt",
    summary="End all the caller's requests on these routes; they return finished pictures, else 499",
    response_model=None,
    responses=documents.errors(401, 403),
)
async def interrupt(service: TheService, jobs: TheJobs, caller: Caller) -> dict[str, Any]:
    await service.cancel(jobs.of(caller))
    return {}


@routes.post(
    "/skip",
    summary="End only the oldest of the caller's requests",
    response_model=None,
    responses=documents.errors(401, 403),
)
async def skip(service: TheService, jobs: TheJobs, caller: Caller) -> dict[str, Any]:
    await service.cancel(jobs.of(caller)[:1])
    return {}


routes.include_router(lists.routes)


async def _draw(context: Context, choices: Choices, jobs: Jobs, body: DrawBody, name: str) -> JSONResponse:
    request, service = context.request, context.service
    image_request, warnings = await request_of(context, choices, body)
    ignored = body.ignored()
    image_request = replace(image_request, keep=_store_callback(context, required=bool(body.save_images)))
    if isinstance(body, Img2ImgBody):
        image_request = replace(image_request, fitting=body.fitting(), mask_padding=body.mask_padding)
        images, mask = await asyncio.to_thread(body.sources)
        image_request = replace(image_request, images=images, mask=mask)
    units = await asyncio.to_thread(control_units.units_of, body.alwayson_scripts, image_request.images)
    control_units.release(body.alwayson_scripts)
    image_request = replace(image_request, controls=units.controls)
    warnings += units.warnings
    job, results = await jobs.draw(image_request, name, warnings)
    saved = [part.name for part in job.parts if part.name] if body.save_images else []
    base = urls.base_url(request, service.settings)
    warnings += [warning for done in results for warning in done.warnings]
    info = shapes.info(body, job, results, warnings, [answers.picture_url(base, each) for each in saved])
    encoded = [_base64(done.file) for done in results] if body.send_images is not False else []
    headers = answers.warning_headers(ignored, [replace(results[0], warnings=tuple(warnings))])
    return JSONResponse({"images": encoded, "parameters": body.understood(), "info": info}, headers=headers)


def _store_callback(context: Context, *, required: bool) -> StorePicture | None:
    return keeper(context.gallery, caller_of(context.request), "png", lambda done: done.file, required=required)


def _current_image(jobs: list[Job]) -> str | None:
    """Latest preview of the first picture that has one, at the picture's size, as base64."""
    parts = [part for job in jobs for part in job.parts if not part.done]
    preview = next((part.preview for part in parts if part.preview), None)
    return _base64(recipe.convert(preview.png, size=(preview.width, preview.height))) if preview else None


def _progress(jobs: list[Job], names: Mapping[Job, str], picture: str | None) -> dict[str, Any]:
    progresses = [job.progress() for job in jobs]
    done, total = sum(each.step for each in progresses), sum(each.total for each in progresses)
    positions = [each.queue_position for each in progresses if each.state == "queued"]
    parts = [part for job in jobs for part in job.parts if not part.done]
    current = next((part for part in parts if part.step), None)
    return {
        "progress": min(1.0, done / total) if total else 0.0,
        "eta_relative": round(max((each.seconds_left or 0.0 for each in progresses), default=0.0), 1),
        "state": {
            "skipped": False,
            "interrupted": False,
            "job": names.get(jobs[0], "") if jobs else "",
            "job_count": sum(each.pictures for each in progresses),
            "job_no": sum(each.pictures_done for each in progresses),
            "job_timestamp": shapes.timestamp(jobs[0].created) if jobs else "0",
            "sampling_step": current.step if current else 0,
            "sampling_steps": current.total if current else 0,
        },
        "current_image": picture,
        "textinfo": f"queued: {min(positions)} turns" if positions and len(positions) == len(progresses) else None,
    }


def _upscaler(service: Service, name: str | None) -> str:
    service.catalog.refresh()
    names = lists.upscaler_names(service)
    if name in names:
        return str(name)
    have = f"available: {', '.join(names)}" if names else "no model file has an upscaling pipeline"
    wrong = f"{name!r} is not an upscaler" if name else "is missing"
    raise InvalidRequest(
        f"upscaler_1: {wrong}; {have}. Plain resizing is not supported.",
        param="upscaler_1",
    )


def _scale(factor: float | None) -> int:
    if factor not in (2, 4):
        raise InvalidRequest(f"upscaling_resize: {in_words(factor)}; 2 and 4 are valid", param="upscaling_resize")
    return int(factor)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
