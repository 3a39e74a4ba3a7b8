"""Ollama's routes that picture models have; those of text models answer that there are none."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import JSONResponse, Response

from sfumato import __version__
from sfumato.api.dependencies import Context, TheContext, TheService
from sfumato.api.http import documents
from sfumato.api.http.auth import caller_of
from sfumato.api.http.forms import openapi_json, read_object, reader
from sfumato.api.keeping import keeper
from sfumato.api.models import of_pictures
from sfumato.api.ollama import answers as shapes
from sfumato.api.ollama.bodies import MAX_NAME, GenerateBody, ShowBody
from sfumato.api.openai import answers
from sfumato.checkpoints.static_capabilities import static_capabilities
from sfumato.config import ModelConfig
from sfumato.core import Done
from sfumato.errors import InvalidRequest, ModelNotFound
from sfumato.sampling import PARAMETERS
from sfumato.serving.job import Job
from sfumato.serving.service import Service
from sfumato.status import Abilities

VERSION = "0.22.0"
"""Of Ollama: one that had these routes. Its clients refuse to talk to much older ones."""

TAG = ":latest"
"""What a name without a tag means there."""

FOREVER = "2318-01-01T00:00:00Z"
"""What Ollama says of a model that stays in memory."""

LOADED = ("ready", "in_main_memory")

TEXT_ROUTES: Mapping[str, str] = {
    "chat": "chat", "embed": "embeddings", "embeddings": "embeddings",
}  # fmt: skip
"""Routes of text models → what no model here supports."""

FILE_ROUTES = {"pull": "POST", "push": "POST", "create": "POST", "copy": "POST", "delete": "DELETE"}


_errors = functools.partial(documents.errors, model=documents.ErrorText)


routes = APIRouter(prefix="/api", tags=["Ollama"])


@routes.post(
    "/generate",
    summary="Draw a picture",
    openapi_extra=openapi_json(GenerateBody),
    responses={
        200: {
            "model": shapes.Generated,
            "description": "With `stream: false` one object, otherwise one a line",
            "content": {shapes.NDJSON: {"schema": {"type": "string"}}},
        },
        **documents.ACCEPTED,
        **_errors(*documents.REASONS),
    },
)
async def generate(body: Annotated[GenerateBody, Depends(reader(GenerateBody))], context: TheContext) -> Response:
    request, service, gallery = context.request, context.service, context.gallery
    config, progress = config_of(service, body.model), shapes.Progress(body.model or "")
    if not body.prompt:
        return await _without_prompt(service, config, body, progress)
    body.model = config.name
    form, ignored = answers.output_format(body, ""), body.ignored()
    keep = keeper(gallery, caller_of(request), form.format, form.encode, required=False)
    more = context.origin | {"keep": keep}
    if body.stream is False:
        job, results = await answers.unless_gone(request, _drawn(context, body, more))
        answer = await progress.final(job.parts[0], form)
        return JSONResponse(answer, headers=answers.warning_headers(ignored, results))
    job = await answers.unless_gone(request, answers.started_job(service, body, more))
    return answers.Stream(job, shapes.lines(job, form, progress), ignored, shapes.NDJSON, progress.line)


async def _drawn(context: Context, body: GenerateBody, more: Mapping[str, Any]) -> tuple[Job, list[Done]]:
    job = await answers.submit(context.service, body, more)
    return job, await answers.all_pictures(job, context.gallery)


async def _without_prompt(
    service: Service, config: ModelConfig, body: GenerateBody, progress: shapes.Progress
) -> JSONResponse:
    """Load the model, or unload it: as `ollama run` and `ollama stop` ask for it."""
    unload = body.keep_alive == 0
    if unload:
        await service.unload(config.name)
    else:
        await service.load_now(config.name)
    return JSONResponse(progress.answer(done=True, done_reason="unload" if unload else "load"))


@routes.get("/tags", summary="All models of pictures", response_model=shapes.Tags, responses=_errors(401, 403))
async def tags(service: TheService) -> dict[str, Any]:
    configs = await of_pictures(service)
    return {"models": await asyncio.to_thread(lambda: [_tag(service, config) for config in configs])}


@routes.get("/ps", summary="Models in memory", response_model=shapes.Running, responses=_errors(401, 403))
async def running(service: TheService) -> dict[str, Any]:
    service.catalog.refresh()
    loaded = [each for each in service.catalog.all() if service.engine.status(each.name).state in LOADED]
    return {"models": [_running(service, config) for config in loaded]}


@routes.post(
    "/show",
    summary="A model",
    openapi_extra=openapi_json(ShowBody),
    response_model=shapes.Shown,
    responses=_errors(400, 401, 403, 404, 413, 415, 500),
)
async def show(body: Annotated[ShowBody, Depends(reader(ShowBody))], service: TheService) -> dict[str, Any]:
    return await asyncio.to_thread(_shown, service, config_of(service, body.model))


@routes.get("/version", summary="Version of this API", response_model=shapes.Version, responses=_errors(401, 403))
async def version() -> dict[str, str]:
    return {"version": VERSION, "sfumato": __version__}


def config_of(service: Service, name: str | None) -> ModelConfig:
    """The model of a name, with or without its tag. Raises ModelNotFound in Ollama's words."""
    service.catalog.refresh()
    try:
        try:
            return service.catalog.get(name)
        except ModelNotFound:
            if name is None or not name.endswith(TAG):
                raise
            return service.catalog.get(name.removesuffix(TAG))
    except ModelNotFound as error:
        raise ModelNotFound(f"model '{(name or '')[:100]}' not found: {error.message}", param="model") from None


def _add_refusals() -> None:
    """What clients of text models send. A model's name in it is read, as Ollama does."""
    for path, ability in TEXT_ROUTES.items():
        routes.add_api_route(f"/{path}", _of_text(ability), methods=["POST"], include_in_schema=False)
    for path, method in FILE_ROUTES.items():
        routes.add_api_route(f"/{path}", _of_files, methods=[method], include_in_schema=False)


def _of_text(ability: str) -> Any:
    async def refuse(body: Annotated[dict[str, Any], Depends(read_object)], service: TheService) -> None:
        name = body.get("model") or body.get("name")
        if not isinstance(name, str) or len(name) > MAX_NAME:
            raise InvalidRequest("model is required", param="model")
        config_of(service, name)
        raise InvalidRequest(
            f'"{name}" does not support {ability}: it draws pictures. Send its prompt to /api/generate.', param="model"
        )

    return refuse


async def _of_files(body: Annotated[dict[str, Any], Depends(read_object)]) -> None:
    raise InvalidRequest(
        "models are added, changed and removed as files of the server: `sfumato add`, `sfumato pull` and `sfumato "
        "remove` do that"
    )


_add_refusals()


def _item(service: Service, config: ModelConfig) -> dict[str, Any]:
    info = service.engine.status(config.name).info
    pipeline = (info or static_capabilities(config)).pipeline or config.pipeline_type or ""
    name = config.name if ":" in config.name else config.name + TAG
    return {
        "name": name,
        "model": name,
        "size": info.memory_bytes if info else 0,
        "digest": hashlib.sha256(f"{config.name} {config.created}".encode()).hexdigest(),
        "details": {
            "parent_model": "",
            "format": "safetensors",
            "family": pipeline,
            "families": [pipeline] if pipeline else [],
            "parameter_size": "",
            "quantization_level": info.dtype if info else "",
        },
    }


def _tag(service: Service, config: ModelConfig) -> dict[str, Any]:
    return _item(service, config) | {"modified_at": shapes.timestamp(config.created)}


def _running(service: Service, config: ModelConfig) -> dict[str, Any]:
    info = service.engine.status(config.name).info
    on_accelerator = info is not None and info.device != "cpu"
    item = _item(service, config)
    return item | {"size_vram": item["size"] if on_accelerator else 0, "expires_at": FOREVER}


def _shown(service: Service, config: ModelConfig) -> dict[str, Any]:
    info = service.engine.status(config.name).info
    capabilities = info or static_capabilities(config)
    abilities = capabilities.abilities or Abilities()
    vision = ["vision"] if abilities.input("image") else []
    sampling = info.sampling if info else config.sampling
    parameters = {each.name: sampling[each] for each in PARAMETERS if sampling[each] not in (None, "")}
    tag = _tag(service, config)
    return {
        "modelfile": f"# {config.label}\n",
        "parameters": "\n".join(f"{name} {json.dumps(value)}" for name, value in parameters.items()),
        "template": "{{ .Prompt }}",
        "details": tag["details"],
        "model_info": {"general.architecture": tag["details"]["family"], "general.basename": config.name},
        "capabilities": [abilities.kind, *vision],
        "modified_at": tag["modified_at"],
    }
