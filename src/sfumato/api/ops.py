"""Health, and the pictures that were drawn."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException

from sfumato import __version__
from sfumato.service import Service
from sfumato.store import Store


def router(service: Service, store: Store) -> APIRouter:
    routes = APIRouter()

    @routes.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("docs")

    @routes.get("/healthz", summary="Is the process alive?")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "version": __version__}

    @routes.get("/readyz", summary="Can it draw?", responses={503: {"description": "Not yet"}})
    async def readyz() -> JSONResponse:
        service.catalog.refresh()
        if not service.engine.ready:
            return JSONResponse({"status": "starting", "reason": "the worker is not up yet"}, 503)
        if not service.catalog.all():
            return JSONResponse({"status": "no models", "reason": "no model file can be used"}, 503)
        return JSONResponse({"status": "ready"})

    @routes.get("/generated-images/{name}", summary="A picture that was drawn", response_class=FileResponse)
    async def picture(name: str) -> FileResponse:
        path = store.path(name)
        if path is None:
            raise HTTPException(404)
        return FileResponse(path, media_type="image/png", headers={"cache-control": "public, immutable"})

    return routes
