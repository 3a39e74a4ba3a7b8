"""Requests of AUTOMATIC1111's clients as jobs. They have no job ids: a call refers to all jobs of its caller."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, TypeAlias

from fastapi import Depends

from sfumato.api.a1111 import hires as hires_fields
from sfumato.api.a1111.bodies import MODEL, DrawBody, Txt2ImgBody
from sfumato.api.a1111.lists import Choices
from sfumato.api.a1111.samplers import choose
from sfumato.api.dependencies import Context, part
from sfumato.api.http.auth import caller_of
from sfumato.core import Done
from sfumato.errors import Cancelled, InvalidRequest
from sfumato.sampling import Hires, Sampling
from sfumato.serving.job import Job
from sfumato.serving.own_size import own_size
from sfumato.serving.planning import ImageRequest, refuse_size
from sfumato.serving.service import Service

DEFAULT_SIDE = 512
"""AUTOMATIC1111's, in pixels, of a first pass whose size neither the request nor the model says."""

PREVIEWS = 8
"""Previews per picture, for `progress`."""


class Jobs:
    """The jobs of these routes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.names: dict[Job, str] = {}
        """Jobs of these routes → their name in `state`. Other jobs of the caller do not belong to these clients."""

    def of(self, caller: str) -> list[Job]:
        """Oldest first."""
        return [job for job in self._service.jobs(caller) if job in self.names]

    async def draw(self, request: ImageRequest, name: str, warnings: list[str]) -> tuple[Job, list[Done]]:
        """The job and its pictures; after an interruption, those that are finished, and a warning."""
        job = await self._service.submit(request)
        self.names[job] = name
        try:
            return job, await job.pictures()
        except Cancelled:
            done = [part.done for part in job.parts if part.done]
            if not done:
                raise Cancelled("interrupted before a picture was finished") from None
            warnings.append(f"interrupted: {len(done)} of {len(job.parts)} pictures were finished")
            return job, done
        finally:
            del self.names[job]


TheJobs: TypeAlias = Annotated[Jobs, Depends(part("a1111_jobs"))]


async def request_of(context: Context, choices: Choices, body: DrawBody) -> tuple[ImageRequest, list[str]]:
    """The request without its pictures, and warnings for known differences."""
    service, caller = context.service, caller_of(context.request)
    settings = service.settings
    if body.pictures > settings.max_n:
        raise InvalidRequest(
            f"batch_size x n_iter: {body.pictures} pictures; at most {settings.max_n} per request",
            param="batch_size",
        )
    if body.width or body.height:
        refuse_size(service.limits, body.width or 512, body.height or 512, "width x height", param="width")
    model = choices.model_for_title(body.model) if body.model else choices.of(caller)
    if body.overrides.get(MODEL):
        model = choices.model_for_title(body.overrides[MODEL])
        if body.override_settings_restore_afterwards is False:
            choices.choose(caller, model)
    choice = choose(body.sampler, body.scheduler)
    sampling, hires = body.sampling(choice.scheduler), None
    second: list[str] = []
    if isinstance(body, Txt2ImgBody) and body.enable_hr:
        sampling, hires, second = await _in_two_passes(service, choices, body, sampling, model)
    image_request = ImageRequest(
        prompts=[body.prompt or ""],
        split_prompt=False,
        model=model,
        n=body.pictures,
        seed=body.seed,
        sampling=sampling,
        hires=hires,
        previews=PREVIEWS,
        priority=body.priority,
        **context.origin,
        webui=True,
        crop=True,
        weights=True,
        loras=body.all_loras,
        replace_loras=bool(body.replace_loras),
    )
    return image_request, [*body.warnings(), *choice.warnings, *second]


async def _in_two_passes(
    service: Service, choices: Choices, body: Txt2ImgBody, sampling: Sampling, model: str | None
) -> tuple[Sampling, Hires, list[str]]:
    """The first pass at its size, the second one, and warnings. The size of the result is checked."""
    service.catalog.refresh()
    config = service.catalog.get(model)
    hires_fields.check_checkpoint(body, lambda title: choices.model_for_title(title) == config.name)
    own, _ = await own_size(service.engine, config, DEFAULT_SIDE)
    width, height = sampling.size or own
    hires, warnings = hires_fields.hires_of(body, sampling, (width, height))
    return replace(sampling, width=width, height=height), hires, warnings
