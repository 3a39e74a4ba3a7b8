"""Security headers of every response: no type sniffing, no framing, no scripts that are not listed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

NOTHING = "default-src 'none'; frame-ancestors 'none'; sandbox"
"""For responses other than pages: opened in a tab, a picture or JSON cannot load or run anything."""

DEFAULTS: Mapping[str, str] = MappingProxyType(
    {
        "content-security-policy": NOTHING,
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
    }
)


class SecurityHeaders:
    """ASGI middleware: adds `DEFAULTS`, unless a route set its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in DEFAULTS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, with_headers)


def header_text(text: str) -> str:
    """Sanitise caller-supplied text for a header: no line breaks, limited length."""
    return text.encode("unicode_escape").decode()[:2000].strip()
