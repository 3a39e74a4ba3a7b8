"""The LoRAs that requests can name."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from sfumato.api.dependencies import TheService
from sfumato.api.http import documents
from sfumato.checkpoints import lora_files
from sfumato.serving.service import Service


class LoraItem(BaseModel):
    id: str = Field(description="Value for `name` of an entry of `loras` in a request.")
    object: str
    path: str = Field(description="Below the folder `loras`; of a model's own: as its file says.")
    bytes: int | None
    base: str | None = Field(description="The kind of model that it is made for, as its file says.")
    models: list[str] | None = Field(description="The models that it always acts on; null: those that name it.")


class LoraList(BaseModel):
    object: str
    data: list[LoraItem]


routes = APIRouter(tags=["Models"])


@routes.get(
    "/loras",
    summary="The LoRAs that requests can name: files in `loras/` beside the model files, and those of model files",
    response_model=LoraList,
    responses=documents.errors(401, 403),
)
async def list_loras(service: TheService) -> dict[str, Any]:
    service.catalog.refresh()
    return {"object": "list", "data": await asyncio.to_thread(_listed, service)}


def _listed(service: Service) -> list[dict[str, Any]]:
    files = [
        {"id": name, "object": "lora", "path": found.path, "bytes": found.bytes, "base": found.base, "models": None}
        for name, found in lora_files.described(service.settings.models).items()
    ]
    own: dict[tuple[str, str], list[str]] = {}
    for config in service.catalog.all():
        for name, source in lora_files.of_model(config).items():
            own.setdefault((name, lora_files.shown(source)), []).append(config.name)
    return files + [
        {"id": name, "object": "lora", "path": source, "bytes": None, "base": None, "models": models}
        for (name, source), models in own.items()
    ]
