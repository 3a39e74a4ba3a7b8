"""The page at /docs: Swagger UI from this server, as FastAPI's own page loads scripts from the internet.

Also the OpenAPI document, generated once and outside the event loop.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, Response
from starlette.exceptions import HTTPException

FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")
"""Files from the package fastapi-offline, which is kept up to date."""

FOLDER = Path(str(resources.files("fastapi_offline"))) / "static"

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'"
)
"""Swagger UI starts with an inline script."""


class Document:
    """An application's OpenAPI document as JSON."""

    def __init__(self, openapi: Callable[[], dict[str, Any]]) -> None:
        self._openapi = openapi
        self._lock = asyncio.Lock()
        self._cached: tuple[str, bytes] | None = None

    async def rendered(self, root: str) -> bytes:
        """The document for clients that reach the application below the path `root`. Cached for the latest one."""
        async with self._lock:  # so that it is rendered once
            if self._cached is None or self._cached[0] != root:
                document = await asyncio.to_thread(self._openapi)
                self._cached = root, await asyncio.to_thread(_rendered, document, [{"url": root}] if root else [])
            return self._cached[1]


routes = APIRouter(include_in_schema=False)


@routes.get("/docs")
async def page() -> HTMLResponse:
    script, style, icon = (f"docs/{name}" for name in FILES)
    # Relative, so that it works below a proxy's prefix.
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Sfumato",
        swagger_js_url=script,
        swagger_css_url=style,
        swagger_favicon_url=icon,
    )
    page.headers["content-security-policy"] = POLICY
    return page


@routes.get("/openapi.json")
async def openapi(request: Request) -> Response:
    document: Document = request.app.state.document
    return Response(await document.rendered(request.scope.get("root_path", "")), media_type="application/json")


@routes.get("/docs/{name}")
async def file(name: str) -> FileResponse:
    if name not in FILES:
        raise HTTPException(404)
    return FileResponse(FOLDER / name, headers={"cache-control": "public, max-age=86400"})


def _rendered(document: dict[str, Any], servers: list[dict[str, str]]) -> bytes:
    more = {"servers": [*servers, *document.get("servers", [])]} if servers else {}
    return json.dumps(document | more, ensure_ascii=False, separators=(",", ":")).encode()
