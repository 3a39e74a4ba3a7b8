"""The part of AUTOMATIC1111's API that its clients use: drawing, progress, interruption.

It has no job ids: everything refers to the caller's own requests (`auth.caller_of`).
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse

from sfumato.api.a1111 import answers as shapes
from sfumato.api.a1111 import lists
from sfumato.api.a1111.bodies import MODEL, DrawBody, Img2ImgBody, PngInfoBody, Txt2ImgBody, UpscaleBody
from sfumato.api.a1111.samplers import choose, plainer
from sfumato.api.http import documents, urls
from sfumato.api.http.auth import caller_of
from sfumato.api.http.forms import described, reader
from sfumato.api.keeping import keeper
from sfumato.api.openai import answers
from sfumato.core import Done, Keep
from sfumato.errors import Cancelled, InvalidRequest
from sfumato.pictures import images as pictures
from sfumato.pictures import recipe
from sfumato.pictures.gallery import Gallery
from sfumato.serving.job import Job
from sfumato.serving.planning import ImageRequest, refuse_size
from sfumato.serving.service import Service

PREVIEWS = 8
"""Previews per picture, for `progress`."""

SENT_UNASKED: Mapping[str, str] = MappingProxyType(
    {"scheduler": "scheduler", "step": "scheduler", "guidance_scale": "guidance_scale", "num_inference_steps": "steps"}
)
"""Parameter that the engine may refuse → field of `ImageRequest` to drop: clients send these to every model."""

ERRORS = documents.errors(*documents.REASONS)
UPSCALE_ERRORS = {status: said for status, said in ERRORS.items() if status not in (404, 507)}


def router(service: Service, gallery: Gallery) -> APIRouter:
    """The routes below `/sdapi/v1`."""
    routes = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
    choices = lists.Choices(service)
    running: dict[Job, str] = {}
    """Jobs of these routes → their name in `state`. Other jobs of the caller do not belong to these clients."""

    def mine(request: Request) -> list[Job]:
        return [job for job in service.jobs(caller_of(request)) if job in running]

    def kept_as_drawn(request: Request, *, must: bool) -> Keep | None:
        return keeper(gallery, caller_of(request), "png", lambda done: done.png, must=must)

    async def paint(body: DrawBody, request: Request, name: str) -> JSONResponse:
        asked, warnings = _asked(service, choices, body, request)
        ignored = body.ignored()
        asked = replace(asked, keep=kept_as_drawn(request, must=bool(body.save_images)))
        if isinstance(body, Img2ImgBody):
            asked = replace(
                asked, fitting=body.fitting(), strength=body.denoising_strength, mask_padding=body.mask_padding
            )
            images, mask = await asyncio.to_thread(body.sources)
            asked = replace(asked, images=images, mask=mask)
        job, drawn = await finish(asked, name, warnings)
        saved = [part.name for part in job.parts if part.name] if body.save_images else []
        base = urls.base_url(request, service.settings)
        warnings += [warning for done in drawn for warning in done.warnings]
        info = shapes.info(body, job, drawn, warnings, [f"{base}/generated-images/{each}" for each in saved])
        sent = [_base64(done.png) for done in drawn] if body.send_images is not False else []
        headers = answers.noted(ignored, [replace(drawn[0], warnings=tuple(warnings))])
        return JSONResponse({"images": sent, "parameters": body.shown(), "info": info}, headers=headers)

    async def finish(asked: ImageRequest, name: str, warnings: list[str]) -> tuple[Job, list[Done]]:
        """The job and its pictures. Drops parameters that clients always send but the model refuses, with a warning."""
        while True:
            try:
                return await draw(asked, name, warnings)
            except InvalidRequest as error:
                less = _without(asked, error)
                if less is None:
                    raise
                # Refusals come before the first step, so nothing is drawn twice.
                warnings.append(f"{SENT_UNASKED[error.param or '']}: left out: {error.message}")
                asked = less

    async def draw(asked: ImageRequest, name: str, warnings: list[str]) -> tuple[Job, list[Done]]:
        job = await service.submit(asked)
        running[job] = name
        try:
            return job, await job.pictures()
        except Cancelled:
            drawn = [part.done for part in job.parts if part.done]
            if not drawn:
                raise Cancelled("interrupted before a picture was finished") from None
            warnings.append(f"interrupted: {len(drawn)} of {len(job.parts)} pictures were finished")
            return job, drawn
        finally:
            del running[job]

    @routes.post(
        "/txt2img",
        summary="Draw pictures",
        openapi_extra=_json(Txt2ImgBody),
        responses={**ERRORS, 200: {"model": shapes.Drawn}},
    )
    async def txt2img(body: Annotated[Txt2ImgBody, Depends(reader(Txt2ImgBody))], request: Request) -> JSONResponse:
        return await answers.unless_gone(request, paint(body, request, "txt2img"))

    @routes.post(
        "/img2img",
        summary="Draw from a picture, or redraw where the mask is white",
        openapi_extra=_json(Img2ImgBody),
        responses={**ERRORS, 200: {"model": shapes.Drawn}},
    )
    async def img2img(body: Annotated[Img2ImgBody, Depends(reader(Img2ImgBody))], request: Request) -> JSONResponse:
        return await answers.unless_gone(request, paint(body, request, "img2img"))

    @routes.post(
        "/extra-single-image",
        summary="Upscale a picture with an upscaling model",
        openapi_extra=_json(UpscaleBody),
        responses={**UPSCALE_ERRORS, 200: {"model": shapes.Upscaled}},
    )
    async def upscale(body: Annotated[UpscaleBody, Depends(reader(UpscaleBody))], request: Request) -> JSONResponse:
        model = _upscaler(service, body.upscaler_1)
        data = await asyncio.to_thread(pictures.from_text, body.image, "image")
        body.image = ""
        asked = ImageRequest(
            prompts=[""],
            model=model,
            n=1,
            images=[data],
            upscale=_scale(body.upscaling_resize),
            id=request.state.request_id,
            caller=caller_of(request),
            keep=kept_as_drawn(request, must=False),
        )
        _, drawn = await answers.unless_gone(request, draw(asked, "extras", []))
        answer = {"image": _base64(drawn[0].png), "html_info": ""}
        return JSONResponse(answer, headers=answers.noted(body.ignored(), drawn))

    @routes.post(
        "/png-info",
        summary="The generation parameters in a picture",
        openapi_extra=_json(PngInfoBody),
        response_model=shapes.PngInfo,
        responses=documents.errors(400, 401, 403, 413, 415, 429),
    )
    async def png_info(body: Annotated[PngInfoBody, Depends(reader(PngInfoBody))], request: Request) -> dict[str, Any]:
        data = await asyncio.to_thread(pictures.from_text, body.image, "image")
        body.image = ""
        items = await answers.unless_gone(request, service.texts(data))
        info = items.pop(recipe.INFOTEXT_CHUNK, "")
        return {"info": info, "items": items, "parameters": recipe.parse(info) if info else {}}

    @routes.get(
        "/progress",
        summary="Progress of the caller's requests on these routes",
        response_model=shapes.ProgressAnswer,
        responses=documents.errors(400, 401, 403),
    )
    async def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
        jobs = mine(request)
        picture = None if skip_current_image else await asyncio.to_thread(_current_image, jobs)
        return _progress(jobs, running, picture)

    @routes.post(
        "/interrupt",
        summary="End all the caller's requests on these routes; they return finished pictures, else 499",
        response_model=None,
        responses=documents.errors(401, 403),
    )
    async def interrupt(request: Request) -> dict[str, Any]:
        await service.cancel(mine(request))
        return {}

    @routes.post(
        "/skip",
        summary="End only the oldest of the caller's requests",
        response_model=None,
        responses=documents.errors(401, 403),
    )
    async def skip(request: Request) -> dict[str, Any]:
        await service.cancel(mine(request)[:1])
        return {}

    routes.include_router(lists.router(service, choices))
    return routes


def _asked(
    service: Service, choices: lists.Choices, body: DrawBody, request: Request
) -> tuple[ImageRequest, list[str]]:
    """The request without its pictures, and warnings for known differences."""
    settings, caller = service.settings, caller_of(request)
    if body.pictures > settings.max_n:
        raise InvalidRequest(
            f"batch_size x n_iter: {body.pictures} pictures; at most {settings.max_n} per request",
            param="batch_size",
        )
    if body.width or body.height:
        refuse_size(service.limits, body.width or 512, body.height or 512, "width x height", param="width")
    model = choices.of(caller)
    if body.overrides.get(MODEL):
        model = choices.found(body.overrides[MODEL])
        if body.override_settings_restore_afterwards is False:
            choices.choose(caller, model)
    chosen = choose(body.sampler, body.scheduler)
    asked = ImageRequest(
        prompts=[body.prompt or ""],
        bar=False,
        negative_prompt=body.negative_prompt,
        model=model,
        n=body.pictures,
        size=body.size,
        steps=body.steps,
        guidance_scale=body.cfg_scale,
        seed=body.seed,
        scheduler=chosen.scheduler,
        clip_skip=body.layers_skipped,
        previews=PREVIEWS,
        id=request.state.request_id,
        caller=caller,
    )
    return asked, [*body.warnings(), *chosen.warnings]


def _without(asked: ImageRequest, error: InvalidRequest) -> ImageRequest | None:
    """The request without the field that the model refuses; None if that field must not be dropped."""
    match SENT_UNASKED.get(error.param or ""):
        case "scheduler" if asked.scheduler:
            return replace(asked, scheduler=plainer(asked.scheduler))
        case "steps" if asked.steps is not None:
            return replace(asked, steps=None)
        case "guidance_scale" if asked.guidance_scale is not None:
            return replace(asked, guidance_scale=None)
        case _:
            return None


def _current_image(jobs: list[Job]) -> str | None:
    """Latest preview of the first picture that has one, at the picture's size, as base64."""
    parts = [part for job in jobs for part in job.parts if not part.done]
    preview = next((part.preview for part in parts if part.preview), None)
    return _base64(recipe.convert(preview.png, size=(preview.width, preview.height))) if preview else None


def _progress(jobs: list[Job], names: Mapping[Job, str], picture: str | None) -> dict[str, Any]:
    seen = [job.progress() for job in jobs]
    done, total = sum(each.step for each in seen), sum(each.total for each in seen)
    waited = [each.queue_position for each in seen if each.state == "queued"]
    parts = [part for job in jobs for part in job.parts if not part.done]
    current = next((part for part in parts if part.step), None)
    return {
        "progress": min(1.0, done / total) if total else 0.0,
        "eta_relative": round(max((each.seconds_left or 0.0 for each in seen), default=0.0), 1),
        "state": {
            "skipped": False,
            "interrupted": False,
            "job": names.get(jobs[0], "") if jobs else "",
            "job_count": sum(each.pictures for each in seen),
            "job_no": sum(each.pictures_done for each in seen),
            "job_timestamp": shapes.timestamp(jobs[0].created) if jobs else "0",
            "sampling_step": current.step if current else 0,
            "sampling_steps": current.total if current else 0,
        },
        "current_image": picture,
        "textinfo": f"queued: {min(waited)} turns" if waited and len(waited) == len(seen) else None,
    }


def _upscaler(service: Service, name: str | None) -> str:
    service.catalog.refresh()
    names = lists.upscaler_names(service)
    if name in names:
        return str(name)
    have = f"available: {', '.join(names)}" if names else "no model file has an upscaling pipeline"
    raise InvalidRequest(
        f"upscaler_1: {name!r} is not an upscaler; {have}. Plain resizing is not supported.",
        param="upscaler_1",
    )


def _scale(factor: float | None) -> int:
    if factor not in (2, 4):
        raise InvalidRequest(f"upscaling_resize: {factor}; 2 and 4 are valid", param="upscaling_resize")
    return int(factor)


def _json(kind: Any) -> dict[str, Any]:
    """OpenAPI's description of a JSON body."""
    body = described(kind)["requestBody"]
    return {"requestBody": body | {"content": {"application/json": body["content"]["application/json"]}}}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
