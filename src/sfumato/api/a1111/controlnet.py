"""The lists that clients of AUTOMATIC1111's ControlNet extension read."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter

from sfumato.api.a1111.control_units import MODEL_FREE, MODULES
from sfumato.api.dependencies import TheService
from sfumato.api.http import documents
from sfumato.checkpoints import ip_adapters
from sfumato.serving.planning import MAX_PICTURES

routes = APIRouter(prefix="/controlnet", tags=["AUTOMATIC1111"], responses=documents.errors(401, 403))

VERSION = 2
"""Of the extension's interface."""


async def _models(service: TheService) -> list[str]:
    return await asyncio.to_thread(ip_adapters.all_listed, service.settings.models)


@routes.get("/version", summary="Version of the ControlNet extension's interface")
async def version() -> dict[str, int]:
    return {"version": VERSION}


@routes.get(
    "/model_list",
    summary="The ControlNets in `controlnets/` and the IP-Adapters in `ip_adapters/` beside the model files",
)
async def model_list(service: TheService) -> dict[str, list[str]]:
    return {"model_list": await _models(service)}


@routes.get("/module_list", summary="The preprocessors of control pictures")
async def module_list() -> dict[str, Any]:
    detail = {name: {"model_free": name in MODEL_FREE, "sliders": []} for name in MODULES}
    return {"module_list": [*MODULES], "module_detail": detail}


@routes.get("/control_types", summary="All kinds of control: one, with every ControlNet, IP-Adapter and preprocessor")
async def control_types(service: TheService) -> dict[str, Any]:
    everything = {"module_list": [*MODULES], "model_list": ["None", *await _models(service)]}
    return {"control_types": {"All": everything | {"default_option": "none", "default_model": "None"}}}


@routes.get("/settings", summary="How many units a request may have")
async def settings() -> dict[str, int]:
    return {"control_net_unit_count": MAX_PICTURES}
