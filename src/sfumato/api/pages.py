"""The page at /docs: Swagger UI from this machine, where FastAPI's own page has scripts from the internet."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from starlette.exceptions import HTTPException

FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")
"""Of the package fastapi-offline, which ships them and is kept current."""


def router() -> APIRouter:
    routes = APIRouter(include_in_schema=False)
    folder = Path(str(resources.files("fastapi_offline"))) / "static"

    @routes.get("/")
    async def root() -> RedirectResponse:
        return RedirectResponse("docs")

    @routes.get("/docs")
    async def page() -> HTMLResponse:
        script, style, icon = (f"docs/{name}" for name in FILES)
        # Relative, so that it is found below a proxy's prefix.
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title="Sfumato",
            swagger_js_url=script,
            swagger_css_url=style,
            swagger_favicon_url=icon,
        )

    @routes.get("/docs/{name}")
    async def file(name: str) -> FileResponse:
        if name not in FILES:
            raise HTTPException(404)
        return FileResponse(folder / name, headers={"cache-control": "public, max-age=86400"})

    return routes
