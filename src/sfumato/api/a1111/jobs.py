"""Requests of AUTOMATIC1111's clients as jobs.

These clients have no job ids: a call refers to all jobs of its caller. They send some parameters to every model; those
that a model does not support are dropped, with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any, TypeAlias

from fastapi import Depends, Request

from sfumato.api.a1111.bodies import MODEL, DrawBody
from sfumato.api.a1111.lists import Choices
from sfumato.api.a1111.samplers import choose, fallback
from sfumato.api.dependencies import part
from sfumato.api.http.auth import caller_of
from sfumato.core import Done
from sfumato.errors import Cancelled, InvalidRequest
from sfumato.sampling import PARAMETERS
from sfumato.serving.job import Job
from sfumato.serving.planning import ImageRequest, refuse_size
from sfumato.serving.service import Service

PREVIEWS = 8
"""Previews per picture, for `progress`."""

OPTIONAL_FIELDS: Mapping[str, str] = MappingProxyType(
    {"scheduler": "scheduler", "step": "scheduler"}
    | {each.argument: each.name for each in PARAMETERS if each.argument and each.optional}
)
"""Parameter that the engine may refuse → field of `Sampling` to drop: clients send these to every model."""


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
        """The job and its pictures. Drops parameters that clients always send but the model refuses, with a warning."""
        while True:
            try:
                return await self.draw_exactly(request, name, warnings)
            except InvalidRequest as error:
                reduced = _without(request, error)
                if reduced is None:
                    raise
                # Refusals come before the first step, so nothing is drawn twice.
                warnings.append(f"{OPTIONAL_FIELDS[error.param or '']}: left out: {error.message}")
                request = reduced

    async def draw_exactly(self, request: ImageRequest, name: str, warnings: list[str]) -> tuple[Job, list[Done]]:
        """The same without dropping anything; after an interruption, the finished pictures."""
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


def request_of(service: Service, choices: Choices, body: DrawBody, request: Request) -> tuple[ImageRequest, list[str]]:
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
        model = choices.model_for_title(body.overrides[MODEL])
        if body.override_settings_restore_afterwards is False:
            choices.choose(caller, model)
    choice = choose(body.sampler, body.scheduler)
    image_request = ImageRequest(
        prompts=[body.prompt or ""],
        split_prompt=False,
        model=model,
        n=body.pictures,
        seed=body.seed,
        sampling=body.sampling(choice.scheduler),
        previews=PREVIEWS,
        id=request.state.request_id,
        caller=caller,
    )
    return image_request, [*body.warnings(), *choice.warnings]


def _without(request: ImageRequest, error: InvalidRequest) -> ImageRequest | None:
    """The request without the field that the model refuses; None if that field must not be dropped."""
    name = OPTIONAL_FIELDS.get(error.param or "")
    if name is None or getattr(request.sampling, name) is None:
        return None
    scheduler = request.sampling.scheduler
    changes: dict[str, Any] = {name: fallback(scheduler) if name == "scheduler" and scheduler else None}
    return replace(request, sampling=replace(request.sampling, **changes))
