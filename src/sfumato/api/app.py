"""The ASGI application: routes and middleware."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware

from sfumato import __version__
from sfumato.api import gallery, hugging_face, localai, loras, models, ops, progress, sounds, status, studio
from sfumato.api.a1111 import controlnet, lists
from sfumato.api.a1111 import jobs as a1111_jobs
from sfumato.api.a1111 import routes as a1111
from sfumato.api.batches import file_routes as files
from sfumato.api.batches import routes as batches
from sfumato.api.batches.batches import Batches
from sfumato.api.batches.files import FileStore
from sfumato.api.batches.pictures import UploadedPictures
from sfumato.api.batches.store import BatchStore
from sfumato.api.chat import routes as chat
from sfumato.api.chat.answers import parse_callers
from sfumato.api.http import errors, pages
from sfumato.api.http.arrivals import ORDERS, Arrivals
from sfumato.api.http.auth import Auth, parse_keys
from sfumato.api.http.cross_site import CrossSite, parse_hosts
from sfumato.api.http.error_shapes import ErrorShapes, Shape, openai_shape, text_shape
from sfumato.api.http.forms import Bodies
from sfumato.api.http.headers import SecurityHeaders
from sfumato.api.http.middleware import AccessLog, BodyCap, Head, LengthCheck, RequestId, UnhandledErrors
from sfumato.api.http.shutdown import ActiveRequests, Shutdown
from sfumato.api.http.urls import Forwarded, check_proxies, check_public_url, parse_origins
from sfumato.api.jobs import routes as jobs
from sfumato.api.jobs.jobs import Jobs
from sfumato.api.jobs.middleware import StoredRequests
from sfumato.api.jobs.store import JobStore
from sfumato.api.jobs.tables import CLIPS
from sfumato.api.mcp import routes as mcp
from sfumato.api.ollama import routes as ollama
from sfumato.api.openai import routes as openai
from sfumato.api.videos import routes as videos
from sfumato.api.videos.documents import video_json
from sfumato.api.webhooks.sender import Webhooks
from sfumato.core import MAX_SEED
from sfumato.errors import SfumatoError
from sfumato.pictures.gallery import Gallery
from sfumato.pictures.store import Store
from sfumato.serving.service import Service

log = logging.getLogger(__name__)

EXPIRE_EVERY_S = 600
"""Interval at which expired pictures are deleted."""

EXPOSED = (
    "x-request-id", "x-sfumato-ignored", "x-sfumato-warning", "retry-after", "x-should-retry", "mcp-session-id",
    "location", "preference-applied", "idempotency-replayed",
)  # fmt: skip
"""Response headers that scripts of other origins may read."""


ERROR_SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "/api/": text_shape,
        "/mcp": mcp.error_shape,
        "POST /": text_shape,
        **{f"POST {path}": openai_shape for path in ORDERS},
        "POST /models/": text_shape,
    }
)
"""Paths of APIs whose errors are not OpenAI's: see `ErrorShapes`."""


class Application(FastAPI):
    """FastAPI with 400 instead of its own 422 in its OpenAPI document, as `errors` answers."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema:
            return self.openapi_schema
        schema = super().openapi()
        for methods in schema["paths"].values():
            for operation in methods.values():
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            schema.get("components", {}).get("schemas", {}).pop(name, None)
        _integer_limits(schema)
        return schema


def _integer_limits(schema: Any) -> None:
    """Integer limits as integers: FastAPI makes them floats, which cannot represent the highest seed."""
    if isinstance(schema, dict):
        if schema.get("type") == "integer":
            limits = {name: int(schema[name]) for name in ("minimum", "maximum") if name in schema}
            schema |= {name: min(value, MAX_SEED) for name, value in limits.items()}
        schema = list(schema.values())
    if isinstance(schema, list):
        for item in schema:
            _integer_limits(item)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    """Start the parts of the application, and stop them in the opposite order."""
    parts = app.state
    await parts.service.start()
    parts.jobs.start()
    parts.batches.start()
    parts.webhooks.start()
    keepers = [asyncio.create_task(_expire(parts.gallery)), asyncio.create_task(parts.history.keep())]
    yield
    for keeper in keepers:
        keeper.cancel()
    await parts.webhooks.stop()
    await parts.batches.stop()
    await parts.jobs.stop()
    parts.bodies.close()
    await parts.mcp.close()
    await parts.service.stop()
    parts.gallery.close()


def create_app(service: Service, store: Store, running: ActiveRequests | None = None) -> FastAPI:
    """The application for a service, which it starts and stops; `running` tracks its requests.

    Raises ValueError naming the setting at fault.
    """
    settings = service.settings
    keys = parse_keys(settings.api_keys)
    origins = parse_origins(settings.cors_origins)
    check_proxies(settings.trusted_proxies)
    check_public_url(settings.public_url)
    parse_hosts(settings.allowed_hosts)
    content_images = parse_callers(settings.content_images, keys)
    picture_gallery = Gallery.of(settings, store, keys)
    service.fetcher.store = store
    stored_jobs = Jobs(service, JobStore.of(settings))
    app = Application(
        title="Sfumato",
        version=__version__,
        description="Text-to-image, image-to-image and inpainting with any diffusers pipeline.",
        lifespan=_lifespan,
        openapi_url=None,  # served by `pages`
        docs_url=None,
        redoc_url=None,
        servers=[{"url": settings.public_url.rstrip("/")}] if settings.public_url else None,
    )
    app.state.service = service
    app.state.store = store
    app.state.gallery = picture_gallery
    app.state.history = status.History(service)
    app.state.content_images = content_images
    app.state.bodies = Bodies(settings.max_text_mb * 2**20)
    app.state.choices = lists.Choices(service)
    app.state.a1111_jobs = a1111_jobs.Jobs(service)
    app.state.jobs = stored_jobs
    app.state.batches = _batches(stored_jobs)
    service.fetcher.uploads = UploadedPictures(app.state.batches.store.files, keyed=bool(keys))
    app.state.webhooks = Webhooks(stored_jobs, settings)
    stored_jobs.application = app
    if running:
        running.at_stop.append(stored_jobs.stopping.set)
    app.state.mcp = mcp.Endpoint(service, picture_gallery, running)
    app.state.document = pages.Document(app.openapi)
    errors.install(app)
    _add_routes(app, keyed=bool(keys))
    _add_middleware(app, keys, origins, running or ActiveRequests())
    return app


def _batches(stored_jobs: Jobs) -> Batches:
    settings, store = stored_jobs.service.settings, stored_jobs.store
    files = FileStore(store, max_bytes=settings.files_max_mb * 2**20)
    kept = BatchStore(store, files, max_age_s=settings.files_max_age_h * 3600)
    # As many as have places, and as many that wait: the places never stand empty.
    queue = stored_jobs.service.queue
    return Batches(stored_jobs, kept, places=lambda: min(queue.places, settings.max_queue))


def _add_routes(app: FastAPI, *, keyed: bool) -> None:
    # Only documents the key in OpenAPI; `Auth` checks it.
    key = [Depends(HTTPBearer(auto_error=False, description="An API key of this server."))] if keyed else []
    for module in (
        openai,
        chat,
        localai,
        sounds,
        jobs,
        files,
        batches,
        videos,
        progress,
        models,
        loras,
        gallery,
        status,
    ):
        app.include_router(module.routes, prefix="/v1", dependencies=key)
        # LocalAI's clients often omit the prefix.
        app.include_router(module.routes, include_in_schema=False)
    app.include_router(videos.of_localai, dependencies=key)
    app.include_router(a1111.routes, dependencies=key)
    app.include_router(controlnet.routes, dependencies=key)
    app.include_router(lists.gradio, dependencies=key)
    app.include_router(models.of_localais_page, dependencies=key)
    app.include_router(ollama.routes, dependencies=key)
    app.include_router(mcp.routes)
    app.include_router(hugging_face.routes, dependencies=key)
    for routes in (ops.routes, gallery.pictures, pages.routes):
        app.include_router(routes)
    studio.install(app)


def _add_middleware(app: FastAPI, keys: Mapping[str, str], origins: Sequence[str], running: ActiveRequests) -> None:
    """What every request passes. The middleware added last sees it."""
    service: Service = app.state.service
    settings = service.settings
    app.add_middleware(Arrivals, service=service)
    app.add_middleware(
        StoredRequests,
        jobs=app.state.jobs,
        shapes=ERROR_SHAPES,
        selected=app.state.choices.of,
        webhook=app.state.webhooks.checked,
        shared=not keys,
        presented={CLIPS: functools.partial(video_json, keep_s=app.state.jobs.store.max_age_s)},
    )
    app.add_middleware(Shutdown, running=running)
    app.add_middleware(BodyCap, limit=settings.max_body_mb * 2**20)
    app.add_middleware(CrossSite, settings=settings, origins=origins, rejected=service.metrics.record_rejection)
    app.add_middleware(Auth, keys=keys, rejected=service.metrics.record_rejection)
    app.add_middleware(UnhandledErrors)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST", "PATCH", "DELETE", "OPTIONS"),
            allow_headers=("*",),  # SDKs send their own headers; cookies are not used
            expose_headers=EXPOSED,
            allow_private_network=True,
        )
    app.add_middleware(Head)
    app.add_middleware(Forwarded, trusted=settings.trusted_proxies)
    app.add_middleware(LengthCheck)
    app.add_middleware(ErrorShapes, shapes=ERROR_SHAPES)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(AccessLog, metrics=service.metrics)
    app.add_middleware(RequestId)


async def _expire(picture_gallery: Gallery) -> None:
    """Delete expired pictures and update the gallery, now and periodically, until cancelled."""
    while True:
        try:
            await asyncio.to_thread(_delete_expired, picture_gallery)
        except (OSError, SfumatoError) as error:
            log.warning("expired pictures could not be deleted: %s", error)
        await asyncio.sleep(EXPIRE_EVERY_S)


def _delete_expired(picture_gallery: Gallery) -> None:
    try:
        stars = picture_gallery.starred()
    except SfumatoError:
        picture_gallery.store.expire()  # e.g. the disk is full
        raise
    picture_gallery.store.expire(spare=stars)
    added, gone = picture_gallery.reconcile()
    if added or gone:
        log.info("the gallery now lists %d more pictures found in its folder, and %d fewer that were gone", added, gone)
