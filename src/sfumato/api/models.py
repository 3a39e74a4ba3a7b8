"""The models that can be asked for, and what each can do."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter

from sfumato.api.http import documents
from sfumato.config import ModelConfig
from sfumato.core import QUALITIES, ModelInfo
from sfumato.models.static_capabilities import static_capabilities
from sfumato.serving.planning import MAX_STEPS
from sfumato.serving.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["Models"])

    @routes.get("/models", summary="Every model", response_model=documents.Models, responses=documents.errors(401, 403))
    async def models() -> dict[str, Any]:
        service.catalog.refresh()
        return {"object": "list", "data": await asyncio.to_thread(_models, service, service.catalog.all())}

    @routes.get(
        "/models/{id:path}",
        summary="One model, by name or alias",
        response_model=documents.Model,
        responses=documents.errors(401, 403, 404, 500),
    )
    async def model(id: str) -> dict[str, Any]:
        service.catalog.refresh()
        return await asyncio.to_thread(_model, service, service.catalog.get(id)) | {"id": id}

    return routes


def _models(service: Service, configs: Sequence[ModelConfig]) -> list[dict[str, Any]]:
    return [_model(service, config) for config in configs]


def _model(service: Service, config: ModelConfig) -> dict[str, Any]:
    status = service.engine.status(config.name)
    facts = status.info
    settings = service.settings
    told = facts or static_capabilities(config)
    return {
        "id": config.name,
        "object": "model",
        "created": config.created,
        "owned_by": "sfumato",
        "sfumato": {
            "status": status.state,
            "detail": status.detail,
            "progress": status.progress,
            "aliases": list(config.aliases),
            "description": config.description,
            "pipeline": told.pipeline or config.pipeline_type,
            "tasks": list(told.tasks) if told.tasks is not None else None,
            "enable_parameters": sorted(config.enable_parameters),
            "defaults": _defaults(config, facts),
            "limits": {
                "n": settings.max_n,
                "steps": MAX_STEPS,
                "pixels": settings.max_pixels,
                "size_multiple": told.size_multiple,
                "prompt_tokens": told.prompt_tokens,
                "max_concurrent": config.max_concurrent,
            },
            "qualities": _qualities(config, facts),
        },
    }


def _defaults(config: ModelConfig, facts: ModelInfo | None) -> dict[str, Any]:
    width, height = (facts.width, facts.height) if facts else (config.width, config.height)
    return {
        "size": f"{width}x{height}" if width and height else None,
        "steps": _steps(config, facts),
        "guidance_scale": facts.guidance_scale if facts else config.cfg_scale,
        "scheduler": config.scheduler_type,
        "negative_prompt": config.negative_prompt,
        "clip_skip": config.clip_skip,
        "strength": config.strength,
        "n": config.n or 1,
        "seed": config.seed,
    }


def _steps(config: ModelConfig, facts: ModelInfo | None) -> int | None:
    return facts.steps if facts else config.steps


def _qualities(config: ModelConfig, facts: ModelInfo | None) -> dict[str, int]:
    steps = _steps(config, facts)
    usual = {name: max(1, round(steps * factor)) for name, factor in QUALITIES.items()} if steps else {}
    return usual | dict(config.quality_steps)
