"""The available models and their capabilities."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from sfumato import schedulers
from sfumato.api.dependencies import TheService
from sfumato.api.http import documents
from sfumato.api.http.forms import openapi_body, reader
from sfumato.api.http.headers import header_text
from sfumato.checkpoints import ip_adapters, net_classes
from sfumato.checkpoints.static_capabilities import static_capabilities
from sfumato.config import ModelConfig
from sfumato.core import QUALITIES
from sfumato.engine.protocol import DeviceState
from sfumato.formats import IMAGE, VIDEO, written_here
from sfumato.sampling import NAMED, PARAMETERS
from sfumato.serving.planning import MAX_PICTURES
from sfumato.serving.service import Service
from sfumato.settings import Settings
from sfumato.status import Abilities, Input, ModelInfo

MAX_NAME = 1000
"""Maximum characters of a model's name."""


class _Order(BaseModel):
    """A misspelt field is refused: without `model` all are unloaded, without `pinned` a model is pinned."""

    model_config = ConfigDict(extra="forbid")


class ModelBody(_Order):
    """Of `POST /v1/models/load`."""

    model: str = Field(min_length=1, max_length=MAX_NAME, description="A name from /v1/models.")


class UnloadBody(_Order):
    """Of `POST /v1/models/unload`."""

    model: Annotated[
        str | None, Field(min_length=1, max_length=MAX_NAME, description="A name from /v1/models; absent: all models.")
    ] = None


class PinBody(ModelBody):
    """Of `POST /v1/models/pin`."""

    pinned: bool = Field(True, description="Whether to keep it in memory when other models need room.")


class Taken(BaseModel):
    """Accepted; the model list shows the progress."""

    success: bool


ORDERS = documents.errors(400, 401, 403, 404, 413, 415, 500)


routes = APIRouter(tags=["Models"])

CAPABILITIES: Mapping[str, str] = MappingProxyType(
    {
        "text-to-image": "image",
        "label-to-image": "image",
        "image-to-image": "image",
        "inpainting": "image",
        "upscaling": "upscale",
        "text-to-video": "video",
        "image-to-video": "video",
        "video-to-video": "video",
        "text-to-audio": "sound_generation",
        "audio-to-audio": "sound_generation",
    }
)
"""Task → LocalAI's name of what it is for."""


@routes.post(
    "/models/load",
    summary="Load a model before its first request",
    openapi_extra=openapi_body(ModelBody),
    response_model=Taken,
    responses=ORDERS,
)
async def load(body: Annotated[ModelBody, Depends(reader(ModelBody))], service: TheService) -> dict[str, Any]:
    service.load(body.model)
    return {"success": True}


@routes.post(
    "/models/unload",
    summary="Free the memory of a model, or of all",
    description="The answer comes when the memory is free. A model in use is unloaded when its requests have ended, "
    "and the header `x-sfumato-warning` says so.",
    openapi_extra=openapi_body(UnloadBody, required=False),
    response_model=Taken,
    responses=ORDERS,
)
async def unload(
    body: Annotated[UnloadBody, Depends(reader(UnloadBody, optional=True))], service: TheService
) -> JSONResponse:
    return JSONResponse({"success": True}, headers=still_in_use(await service.unload(body.model)))


@routes.post(
    "/models/pin",
    summary="Keep a model in memory when others need room, until the server restarts",
    openapi_extra=openapi_body(PinBody),
    response_model=Taken,
    responses=ORDERS,
)
async def pin(body: Annotated[PinBody, Depends(reader(PinBody))], service: TheService) -> dict[str, Any]:
    service.pin(body.model, body.pinned)
    return {"success": True}


@routes.get("/models", summary="All models", response_model=documents.Models, responses=documents.errors(401, 403))
async def models(
    service: TheService,
    output_modalities: Annotated[
        str, Query(max_length=MAX_NAME, description="Only models that answer with all of these, as in `image`.")
    ] = "",
) -> dict[str, Any]:
    service.catalog.refresh()
    data = await asyncio.to_thread(_models, service, service.catalog.all())
    wanted = {word for each in output_modalities.split(",") if (word := each.strip().lower())} - {"all"}
    return {
        "object": "list",
        "data": [each for each in data if wanted <= set(each["architecture"]["output_modalities"])],
    }


async def of_pictures(service: Service) -> list[ModelConfig]:
    """All models but those that are known to make something else: for the lists of clients that know only pictures."""
    service.catalog.refresh()
    known = [(config, await service.abilities(config)) for config in service.catalog.all()]
    return [config for config, abilities in known if abilities is None or abilities.kind == IMAGE]


@routes.get(
    "/models/capabilities",
    summary="All models with what they take and give, as in LocalAI",
    response_model=documents.AllCapabilities,
    responses=documents.errors(401, 403),
)
async def capabilities(service: TheService) -> dict[str, Any]:
    service.catalog.refresh()
    data = await asyncio.to_thread(_models, service, service.catalog.all())
    return {"object": "list", "data": [_capabilities(each) for each in data]}


of_localais_page = APIRouter()
"""What LocalAI's own page asks, as some of its clients do."""


@of_localais_page.get(
    "/api/models/capabilities",
    summary="The same by LocalAI's flags, as its page asks for it",
    tags=["Models"],
    response_model=documents.AllFlags,
    responses=documents.errors(401, 403, model=documents.ErrorText),
)
async def flags(service: TheService) -> dict[str, Any]:
    data = (await capabilities(service))["data"]
    return {
        "data": [
            {"id": each["id"], "capabilities": [f"FLAG_{name.upper()}" for name in each["capabilities"]],
             "backend": "diffusers"}
            for each in data
        ]
    }  # fmt: skip


@routes.get(
    "/models/{id:path}",
    summary="One model, by name or alias",
    response_model=documents.Model,
    responses=documents.errors(401, 403, 404, 500),
)
async def model(id: str, service: TheService) -> dict[str, Any]:
    service.catalog.refresh()
    return (await asyncio.to_thread(_models, service, [service.catalog.get(id)]))[0] | {"id": id}


@routes.get(
    "/schedulers",
    summary="All schedulers",
    response_model=documents.Schedulers,
    responses=documents.errors(401, 403),
)
async def all_schedulers() -> dict[str, Any]:
    descriptions = [(name, schedulers.parse(name).description) for name in schedulers.names()]
    data = [{"id": name, "object": "scheduler", "description": description} for name, description in descriptions]
    return {"object": "list", "data": data}


def still_in_use(names: Sequence[str]) -> dict[str, str]:
    """Headers that say which models are unloaded later."""
    if not names:
        return {}
    sentence = f"model: in use, and unloaded when its requests have ended: {', '.join(names)}"
    return {"x-sfumato-warning": header_text(sentence)}


def _models(service: Service, configs: Sequence[ModelConfig]) -> list[dict[str, Any]]:
    devices = service.engine.devices  # counted once
    return [_model(service, config, devices) for config in configs]


def _model(service: Service, config: ModelConfig, devices: Sequence[DeviceState]) -> dict[str, Any]:
    status = service.engine.status(config.name)
    facts = status.info
    settings = service.settings
    capabilities = facts or static_capabilities(config)
    abilities = capabilities.abilities
    pipeline = capabilities.pipeline or config.pipeline_type
    return {
        "id": config.name,
        "object": "model",
        "created": config.created,
        "owned_by": "sfumato",
        "architecture": _architecture(config, abilities),
        "sfumato": {
            "status": status.state,
            "detail": status.detail or (abilities.problem if abilities else ""),
            "progress": status.progress,
            "memory_bytes": facts.memory_bytes if facts else None,
            "devices": {device.name: known.state for device in devices if (known := device.models.get(config.name))},
            "aliases": list(config.aliases),
            "description": config.description,
            "pipeline": pipeline,
            "tasks": list(abilities.tasks) if abilities else None,
            "inputs": [_input(each) for each in abilities.inputs] if abilities else None,
            "control_nets": _control_nets(pipeline),
            "ip_adapters": ip_adapters.taken_by(pipeline) if pipeline else None,
            "enable_parameters": sorted(config.enable_parameters),
            "defaults": _defaults(config, facts),
            "limits": {
                "n": settings.max_n,
                "steps": int(NAMED["steps"].most or 0),
                "pixels": settings.max_pixels,
                "size_multiple": capabilities.size_multiple,
                "prompt_tokens": capabilities.prompt_tokens,
                "max_concurrent": config.max_concurrent,
                **_lengths(abilities, settings),
            },
            "savings": list(facts.savings) if facts else None,
            "runners": [asdict(each) for each in facts.runners] if facts else None,
            "qualities": _qualities(config, facts),
            "formats": written_here(abilities.kind) if abilities and abilities.tasks else None,
        },
    }


def _lengths(abilities: Abilities | None, settings: Settings) -> dict[str, float | None]:
    """How long a clip or a sound may be: by the settings, and by the rules of the class."""
    kind = abilities.kind if abilities and abilities.tasks else IMAGE
    frames, sound = (abilities.frames, abilities.sound) if abilities else (None, None)
    most = [settings.max_seconds, *([sound.most] if sound and sound.most else [])]
    frames_most = [settings.max_frames, *([frames.most] if frames and frames.most else [])]
    return {
        "frames": min(frames_most) if kind == VIDEO else None,
        "frame_step": frames.step if kind == VIDEO and frames and frames.first == 1 else None,
        "seconds": min(most) if kind != IMAGE else None,
        "sample_rate": sound.rate if sound else None,
    }


def _architecture(config: ModelConfig, abilities: Abilities | None) -> dict[str, list[str]]:
    if abilities is None:  # what is not here yet draws pictures from texts at least
        return {"input_modalities": ["text"], "output_modalities": ["image"]}
    names = {each.name for each in abilities.inputs}
    if not config.enables("image"):
        names -= {"image", "mask"}
    inputs = {"text": {"prompt"}, "image": {"image", "mask", "controls"}, "video": {"video"}, "audio": {"audio"}}
    return {
        "input_modalities": [modality for modality, of in inputs.items() if names & of],
        "output_modalities": [abilities.kind] if abilities.tasks else [],
    }


def _capabilities(model: Mapping[str, Any]) -> dict[str, Any]:
    """LocalAI's entry of a model of the list."""
    tasks = model["sfumato"]["tasks"]
    names = ["image"] if tasks is None else list(dict.fromkeys(CAPABILITIES[task] for task in tasks))
    return {"id": model["id"], "object": "model", "capabilities": names, **model["architecture"]}


def _control_nets(pipeline: str | None) -> list[dict[str, Any]] | None:
    """The ControlNets that requests may name, by the class of the model; None if that is not known."""
    if pipeline is None:
        return None
    return [
        {"class": kind, "most": MAX_PICTURES if each.several else 1, "mode": each.mode}
        for each in net_classes.of(pipeline)
        for kind in each.kinds
    ]


def _input(each: Input) -> dict[str, Any]:
    return {"name": each.name, "required": each.least > 0, "least": each.least, "most": each.most,
            "roles": list(each.roles)}  # fmt: skip


def _defaults(config: ModelConfig, facts: ModelInfo | None) -> dict[str, Any]:
    sampling = facts.sampling if facts else config.sampling
    size = "{}x{}".format(*sampling.size) if sampling.size else None
    others = {each.name: sampling[each] for each in PARAMETERS if not each.side}
    return {"size": size, **others, "n": config.n or 1, "seed": config.seed}


def _qualities(config: ModelConfig, facts: ModelInfo | None) -> dict[str, int]:
    steps = (facts.sampling if facts else config.sampling).steps
    usual = {name: max(1, round(steps * factor)) for name, factor in QUALITIES.items()} if steps else {}
    return usual | dict(config.quality_steps)
