"""What AUTOMATIC1111's clients query before they draw: settings, and lists of choices."""

from __future__ import annotations

import asyncio
import os
import re
from collections import OrderedDict
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, Depends
from starlette.responses import JSONResponse

from sfumato import schedulers
from sfumato.api.a1111 import answers as shapes
from sfumato.api.a1111.bodies import LAYERS, MODEL
from sfumato.api.dependencies import Caller, TheService, part
from sfumato.api.http import documents
from sfumato.api.http.forms import read_object
from sfumato.api.localai import UPSCALERS
from sfumato.api.models import of_pictures, still_in_use
from sfumato.api.openai import answers
from sfumato.checkpoints import embeddings, lora_files
from sfumato.checkpoints.static_capabilities import static_capabilities
from sfumato.config import ModelConfig
from sfumato.errors import InvalidRequest
from sfumato.formats import IMAGE
from sfumato.loras import name_of
from sfumato.pipelines import inputs
from sfumato.sampling import UPSCALERS as UPSCALING
from sfumato.sampling import clip_layer
from sfumato.serving import repeat
from sfumato.serving.service import Service

MAX_CALLERS = 1024
"""Maximum callers whose selected model is remembered; the oldest selection is forgotten first."""

MAX_TITLE = 1000
"""In characters; searching similar names is slow for long ones."""

_TITLE_SUFFIX = re.compile(r"(?:\.(?:safetensors|ckpt))?(?:\s*\[[0-9a-fA-F]*\])?\s*")
"""What clients append to a model's name: an extension, a hash."""

NOTHING = (
    "sd-vae", "hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles",
    "script-info", "extensions",
)  # fmt: skip
"""Routes that list what always empty here → here."""

_ANY_OBJECT = {"type": "object", "additionalProperties": True, "title": "Options"}


class Choices:
    """The model that each caller selected; unlike in AUTOMATIC1111, other callers are not affected."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._models: OrderedDict[str, str] = OrderedDict()

    def of(self, caller: str) -> str | None:
        """The caller's model; None if it selected none."""
        stored = repeat.CURRENT.get()
        return stored.selected if stored else self._models.get(caller)

    def choose(self, caller: str, name: str) -> None:
        self._models[caller] = name
        self._models.move_to_end(caller)
        while len(self._models) > MAX_CALLERS:
            self._models.popitem(last=False)

    def model_for_title(self, title: object) -> str:
        """The name of the model with this title. Raises ModelNotFound."""
        if not isinstance(title, str) or not title.strip():
            raise InvalidRequest(f"{MODEL}: {repr(title)[:80]}; must be a title from /sdapi/v1/sd-models", param=MODEL)
        catalog = self._service.catalog
        catalog.refresh()
        names = {name for config in catalog.all() for name in (config.name, *config.aliases)}
        with_suffix = (name for name in names if title.startswith(name) and _TITLE_SUFFIX.fullmatch(title, len(name)))
        name = title if title in names else next(with_suffix, title[:MAX_TITLE])
        return catalog.get(name).name


TheChoices: TypeAlias = Annotated[Choices, Depends(part("choices"))]

routes = APIRouter(responses=documents.errors(401, 403))


def _options(service: Service, choices: Choices, caller: str) -> dict[str, Any]:
    service.catalog.refresh()
    name = choices.of(caller) or service.catalog.get(None).name
    # The selected model may be gone: drawing requests report that, and here another can be selected.
    config = next((each for each in service.catalog.all() if each.name == name), None)
    return {
        "samples_format": "png",
        MODEL: name,
        "sd_checkpoint_hash": None,
        "sd_vae": "Automatic",
        LAYERS: _layer(service, config) if config else 1,
        "eta_noise_seed_delta": 0,
        "return_grid": False,
        "live_previews_enable": True,
    }


def _layer(service: Service, config: ModelConfig) -> int:
    """The text encoder layer that is read unless a request asks for another one."""
    known = service.engine.status(config.name).info or static_capabilities(config)
    return clip_layer(config.sampling.clip_skip, known.pipeline or config.pipeline_type or "")


@routes.get("/options", summary="The caller's settings", responses=documents.errors(404, 500))
async def options(service: TheService, choices: TheChoices, caller: Caller) -> dict[str, Any]:
    return _options(service, choices, caller)


@routes.post(
    "/options",
    summary=f"Select a model, for this caller only: `{MODEL}`; a header lists ignored settings",
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _ANY_OBJECT}}}},
    response_model=None,
    responses=documents.errors(400, 404, 413, 415, 500),
)
async def set_options(
    options: Annotated[dict[str, Any], Depends(read_object)], service: TheService, choices: TheChoices, caller: Caller
) -> JSONResponse:
    current = _options(service, choices, caller)
    if options.get(MODEL) is not None:
        name = choices.model_for_title(options[MODEL])
        if abilities := await service.abilities(service.catalog.get(name)):
            inputs.check_kind(f"{MODEL}: {name}", abilities, IMAGE, MODEL)
        choices.choose(caller, name)
    ignored = [name for name, value in options.items() if name != MODEL and current.get(name, "") != value]
    return JSONResponse(None, headers=answers.warning_headers(ignored, ()))


@routes.get("/sd-models", summary="All models of pictures", response_model=list[shapes.SdModel])
async def models(service: TheService) -> list[dict[str, Any]]:
    return [
        {"title": config.name, "model_name": config.name, "hash": None, "sha256": None,
         "filename": config.label, "config": None}
        for config in await of_pictures(service)
    ]  # fmt: skip


@routes.post(
    "/unload-checkpoint",
    summary="Free the memory of every model; one in use is unloaded when its requests have ended",
    response_model=None,
)
async def unload(service: TheService) -> JSONResponse:
    return JSONResponse({}, headers=still_in_use(await service.unload(None)))


@routes.post(
    "/reload-checkpoint",
    summary="Load the caller's selected model; the answer comes when it is in memory",
    response_model=None,
    responses=documents.errors(404, 500, 503, 507),
)
async def reload(service: TheService, choices: TheChoices, caller: Caller) -> JSONResponse:
    await service.load_now(choices.of(caller))
    return JSONResponse({})


@routes.get("/samplers", summary="All samplers", response_model=list[shapes.SamplerItem])
async def samplers() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "aliases": list(sampler.aliases),
            "options": {"scheduler": sampler.default_schedule} if sampler.default_schedule else {},
        }
        for name, sampler in schedulers.SAMPLERS.items()
    ]


@routes.get("/schedulers", summary="All schedule types", response_model=list[shapes.Scheduler])
async def schedule_types() -> list[dict[str, Any]]:
    labels = {label.casefold(): label for label in (schedulers.AUTOMATIC, schedulers.UNIFORM)} | dict(
        schedulers.SCHEDULE_TYPES
    )
    return [
        {"name": name, "label": label, "aliases": [], "default_rho": -1, "need_inner_model": False}
        for name, label in labels.items()
    ]


@routes.get(
    "/upscalers", summary="`None`, and every model that is an upscaler", response_model=list[shapes.UpscalerItem]
)
async def upscalers(service: TheService) -> list[dict[str, Any]]:
    service.catalog.refresh()
    # Clients treat the first entry as "no upscaler".
    none = {"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 4}
    return [none] + [none | {"name": name, "model_name": name} for name in upscaler_names(service)]


@routes.get(
    "/latent-upscale-modes",
    summary="How latents may be enlarged between two passes: `hr_upscaler`",
    response_model=list[shapes.Named],
)
async def latent_upscale_modes() -> list[dict[str, str]]:
    return [{"name": name} for name, mode in UPSCALING.items() if mode]


@routes.get(
    "/embeddings",
    summary="Textual inversions in `embeddings/` beside the model files",
    response_model=shapes.Embeddings,
)
async def list_embeddings(service: TheService) -> dict[str, Any]:
    return await asyncio.to_thread(_embeddings, service)


def _embeddings(service: Service) -> dict[str, dict[str, Any]]:
    """Those that can be used, and pickles and files that are none."""
    answer: dict[str, dict[str, Any]] = {"loaded": {}, "skipped": {}}
    for name, path in embeddings.found(service.settings.models).items():
        shape = embeddings.shape(path)
        answer["loaded" if shape else "skipped"][name] = {
            "step": None, "sd_checkpoint": None, "sd_checkpoint_name": None,
            "shape": shape and shape.features, "vectors": shape and shape.vectors,
        }  # fmt: skip
    return answer


@routes.get("/loras", summary="LoRAs in `loras/` beside the model files", response_model=list[shapes.LoraListItem])
async def list_loras(service: TheService) -> list[dict[str, Any]]:
    described = await asyncio.to_thread(lora_files.described, service.settings.models)
    return [
        {"name": name, "alias": name_of(name), "path": found.path, "metadata": dict(found.metadata)}
        for name, found in described.items()
    ]


@routes.post("/refresh-loras", summary="Nothing to do: the folder is read at each request", response_model=None)
async def refresh_loras() -> JSONResponse:
    return JSONResponse(None)


@routes.get("/scripts", summary="Scripts: none", response_model=shapes.Scripts)
async def scripts() -> dict[str, Any]:
    return {"txt2img": [], "img2img": []}


@routes.get("/cmd-flags", summary="Command line flags: none")
async def flags() -> dict[str, Any]:
    return {}


@routes.get("/memory", summary="Memory in use", response_model=shapes.Memory)
async def memory(service: TheService) -> dict[str, Any]:
    stats = service.engine.stats
    cuda = {"allocated": {"current": stats.device_memory_bytes}} if stats.device_memory_bytes else {}
    return {"ram": {"used": stats.memory_bytes, **_ram()}, "cuda": cuda}


@routes.post("/refresh-checkpoints", summary="Read the model files again", response_model=None)
async def refresh(service: TheService) -> JSONResponse:
    service.catalog.refresh()
    return JSONResponse(None)


def _ram() -> dict[str, int]:
    """The machine's memory in bytes, if the system reports it."""
    names = {"free": "SC_AVPHYS_PAGES", "total": "SC_PHYS_PAGES"}
    available = getattr(os, "sysconf_names", {})  # macOS lacks the first, Windows both
    return {key: os.sysconf("SC_PAGE_SIZE") * os.sysconf(name) for key, name in names.items() if name in available}


def upscaler_names(service: Service) -> list[str]:
    return [
        config.name
        for config in service.catalog.all()
        if any(word in (config.pipeline_type or "") for word in UPSCALERS)
    ]


gradio = APIRouter(tags=["AUTOMATIC1111"], responses=documents.errors(401, 403))
"""Of Gradio, which AUTOMATIC1111 stands on: clients ask it whether somebody is there."""


@gradio.get("/queue/status", summary="Pictures that wait, as Gradio says it", response_model=shapes.QueueStatus)
async def queue_status(service: TheService) -> dict[str, Any]:
    before = service.queue.waiting_of(low=False)
    wait = service.queue.wait_s(before) if before else 0.0
    return {"msg": "estimation", "queue_size": service.queue.waiting, "queue_eta": wait, "rank": None, "rank_eta": None}


async def listed() -> list[Any]:
    return []


for path in NOTHING:
    routes.add_api_route(f"/{path}", listed, summary="Always empty", response_model=list[shapes.Named])
