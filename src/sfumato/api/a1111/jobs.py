"""Requests of AUTOMATIC1111's clients as jobs.

These clients have no ids and send what not every model can do. So who calls is whose jobs are meant, and what a model
refuses of that is left out, with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, TypeAlias

from fastapi import Depends, Request

from sfumato.api.a1111.bodies import MODEL, DrawBody
from sfumato.api.a1111.lists import Choices
from sfumato.api.a1111.samplers import choose, plainer
from sfumato.api.dependencies import part
from sfumato.api.http.auth import caller_of
from sfumato.core import Done
from sfumato.errors import Cancelled, InvalidRequest
from sfumato.serving.job import Job
from sfumato.serving.planning import ImageRequest, refuse_size
from sfumato.serving.service import Service

PREVIEWS = 8
"""Of each picture, for `progress`."""

SENT_UNASKED: Mapping[str, str] = MappingProxyType(
    {"scheduler": "scheduler", "step": "scheduler", "guidance_scale": "guidance_scale", "num_inference_steps": "steps"}
)
"""What the engine refuses → the field of `ImageRequest` to do without: clients send these to every model."""


class Jobs:
    """Those that are drawn by these routes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.names: dict[Job, str] = {}
        """Jobs → what their state calls them. Others of the same caller are none of these clients'."""

    def of(self, caller: str) -> list[Job]:
        """Oldest first."""
        return [job for job in self._service.jobs(caller) if job in self.names]

    async def drawn(self, asked: ImageRequest, name: str, warnings: list[str]) -> tuple[Job, list[Done]]:
        """The job and its pictures. What the model cannot do and clients send unasked is left out, with a warning."""
        while True:
            try:
                return await self.drawn_as_asked(asked, name, warnings)
            except InvalidRequest as error:
                less = _without(asked, error)
                if less is None:
                    raise
                # A refusal comes before the first step: nothing is drawn twice.
                warnings.append(f"{SENT_UNASKED[error.param or '']}: left out: {error.message}")
                asked = less

    async def drawn_as_asked(self, asked: ImageRequest, name: str, warnings: list[str]) -> tuple[Job, list[Done]]:
        """The same, with nothing left out; after an interruption the pictures that were done."""
        job = await self._service.submit(asked)
        self.names[job] = name
        try:
            return job, await job.pictures()
        except Cancelled:
            done = [part.done for part in job.parts if part.done]
            if not done:
                raise Cancelled("interrupted before a picture was done") from None
            warnings.append(f"interrupted: {len(done)} of {len(job.parts)} pictures were done")
            return job, done
        finally:
            del self.names[job]


TheJobs: TypeAlias = Annotated[Jobs, Depends(part("a1111_jobs"))]


def request_of(service: Service, choices: Choices, body: DrawBody, request: Request) -> tuple[ImageRequest, list[str]]:
    """The request without its pictures, and what is already known to be done otherwise."""
    settings, caller = service.settings, caller_of(request)
    if body.pictures > settings.max_n:
        raise InvalidRequest(
            f"batch_size x n_iter: {body.pictures} pictures; at most {settings.max_n} are drawn in one request",
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
    """The request with less in it that the model refuses; None where that is not for us to leave out."""
    match SENT_UNASKED.get(error.param or ""):
        case "scheduler" if asked.scheduler:
            return replace(asked, scheduler=plainer(asked.scheduler))
        case "steps" if asked.steps is not None:
            return replace(asked, steps=None)
        case "guidance_scale" if asked.guidance_scale is not None:
            return replace(asked, guidance_scale=None)
        case _:
            return None
