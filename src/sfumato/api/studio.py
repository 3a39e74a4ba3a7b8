"""The studio: the page at `/`, and its modules and styles below `/studio`. It uses only the public API."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

import sfumato

WEB = Path(sfumato.__file__).parent / "web"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""No inline code, nothing from other hosts; the page itself creates `blob:` and `data:`: pictures, and sounds."""

HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-cache",  # revalidated every time, mostly with a 304: a new version is visible at once
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


class _Files(StaticFiles):
    """Serves only the page's own file types, with the page's headers."""

    def file_response(self, full_path: object, stat_result: object, scope: Scope, status_code: int = 200) -> Response:
        answer = super().file_response(full_path, stat_result, scope, status_code)  # type: ignore[arg-type]
        answer.headers.update(HEADERS)
        return answer


routes = APIRouter(include_in_schema=False)


@routes.api_route("/", methods=["GET", "HEAD"])
async def page() -> FileResponse:
    return FileResponse(WEB / "index.html", media_type="text/html; charset=utf-8", headers=HEADERS)


def install(app: FastAPI) -> None:
    app.include_router(routes)
    app.mount("/studio", GZipMiddleware(_Files(directory=WEB)), name="studio")
