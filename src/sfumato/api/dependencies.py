"""FastAPI dependencies of the routes: the parts of the application, and the caller.

`app.create_app` stores the parts in the application's state; a route declares those that it needs as parameters.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from fastapi import Depends, Header, Request
from pydantic import Field

from sfumato.api.fields import PLAIN
from sfumato.api.http.auth import caller_of
from sfumato.errors import InvalidRequest
from sfumato.pictures.gallery import Gallery
from sfumato.pictures.store import Store
from sfumato.serving.service import Service


def part(name: str) -> Callable[[Request], Awaitable[Any]]:
    """A dependency: the attribute of this name of the application's state."""

    async def of_application(request: Request) -> Any:
        return getattr(request.app.state, name)

    return of_application


TheService: TypeAlias = Annotated[Service, Depends(part("service"))]
TheGallery: TypeAlias = Annotated[Gallery, Depends(part("gallery"))]
TheStore: TypeAlias = Annotated[Store, Depends(part("store"))]


DEADLINE = "x-deadline-ms"
MAX_DEADLINE_MS = 86_400_000
"""A day."""

DeadlineMs: TypeAlias = Annotated[
    Annotated[int, Field(ge=1, le=MAX_DEADLINE_MS), PLAIN] | None,
    Header(
        alias=DEADLINE,
        description="Milliseconds from the arrival of the request within which its pictures are wanted. It puts the "
        "request before others of its caller that are due later. A request of which nothing has begun by then is a "
        "504; one that has begun is drawn to its end, with a warning.",
    ),
]


@dataclass(frozen=True, slots=True)
class Context:
    """The arguments of a drawing route besides its body."""

    request: Request
    service: Service
    gallery: Gallery
    deadline: float | None = None
    """When the request should be done, in seconds since 1970."""

    @property
    def origin(self) -> dict[str, Any]:
        """What the request says besides its body, as fields of an `ImageRequest`."""
        return {"caller": caller_of(self.request), "id": self.request.state.request_id, "deadline": self.deadline}


async def _context(
    request: Request, service: TheService, gallery: TheGallery, deadline_ms: DeadlineMs = None
) -> Context:
    if (count := len(request.headers.getlist(DEADLINE))) > 1:
        raise InvalidRequest(f"{DEADLINE}: the header occurs {count} times; send it once", param=DEADLINE)
    deadline = None if deadline_ms is None else request.state.arrived + deadline_ms / 1000
    return Context(request, service, gallery, deadline)


TheContext: TypeAlias = Annotated[Context, Depends(_context)]


async def _caller(request: Request) -> str:
    return caller_of(request)


async def _owner(request: Request, service: TheService) -> str | None:
    return caller_of(request) if service.settings.api_keys else None


Caller: TypeAlias = Annotated[str, Depends(_caller)]
"""The name of the caller's key; without keys its address."""

Owner: TypeAlias = Annotated[str | None, Depends(_owner)]
"""Only this caller's requests and pictures are visible; None, without keys: all, as addresses prove nothing."""
