"""The server's public URL: from the setting, from a trusted proxy's headers, or from the request."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from sfumato.settings import Settings

_HOST = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?P<port>:\d{1,5})?")
_PREFIX = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+){1,16}")
_ORIGIN = re.compile(rf"[a-z][a-z0-9+.-]*://{_HOST.pattern}")
SCHEMES = ("http", "https")
_DEFAULT_PORTS = ("80", "443")


def base_url(request: Request, settings: Settings) -> str:
    """Absolute URL with the path prefix, without a trailing slash."""
    if settings.public_url:
        return settings.public_url.rstrip("/")
    scope = request.scope
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        host = _listening(scope)
    return f"{scope['scheme']}://{host}{scope.get('root_path', '')}"


def sent_host(scope: Scope) -> str:
    """The original Host header, before a proxy's header replaced it."""
    host = scope.get("state", {}).get("sent_host")
    return host if isinstance(host, str) else Headers(scope=scope).get("host", "")


def used_https(scope: Scope) -> bool:
    """Whether the client used https to the server, or to a trusted proxy in front of it."""
    return bool(scope["scheme"] == "https")


def check_public_url(url: str) -> None:
    """Raises ValueError unless the URL is empty, or http(s) without query or fragment."""
    parts = urlsplit(url)
    if url and (parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment):
        raise ValueError(f"public_url={url!r}: must be https://host or https://host/prefix")


def check_proxies(trusted: str) -> None:
    """Raises ValueError unless each entry is an address, a network or `*`."""
    for entry in _entries(trusted):
        try:
            if entry != "*":
                ipaddress.ip_network(entry)
        except ValueError as error:
            raise ValueError(
                f"trusted_proxies: {error}; addresses (127.0.0.1), networks (10.0.0.0/8) or * are valid"
            ) from None


def parse_origins(text: str) -> list[str]:
    """Parse the setting cors_origins. Raises ValueError unless each entry is an origin or `*`."""
    origins = [entry.rstrip("/") for entry in _entries(text)]
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ValueError(f"cors_origins: {origin!r} is not an origin; use e.g. https://host, http://host:3000 or *")
    return origins


class Forwarded:
    """ASGI middleware: applies the X-Forwarded-* headers of `trusted` peers only.

    uvicorn's own middleware handles -For; -Proto, -Host, -Port and -Prefix are handled here. They set the values in
    the scope from which URLs are built: `scheme`, `host`, and `root_path` (which `path` then begins with).

    `trusted` are addresses and networks, comma-separated, or `*`.
    """

    def __init__(self, app: ASGIApp, trusted: str) -> None:
        entries = _entries(trusted)
        self._uvicorn = ProxyHeadersMiddleware(app, "*" if "*" in entries else entries)  # type: ignore[arg-type]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("client")
        if scope["type"] == "http" and (client[0] if client else None) in self._uvicorn.trusted_hosts:
            _apply(scope)
        await self._uvicorn(scope, receive, send)  # type: ignore[arg-type]


def _apply(scope: Scope) -> None:
    headers = Headers(scope=scope)
    # Chained proxies append, in one header line or in several: the first value is from the proxy the client used.
    forwarded = {name: _first(headers, f"x-forwarded-{name}") for name in ("proto", "host", "port", "prefix")}
    if forwarded["proto"].lower() in SCHEMES:
        scope["scheme"] = forwarded["proto"].lower()
    # uvicorn would read the last line.
    scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"x-forwarded-proto"]
    host = forwarded["host"] if _HOST.fullmatch(forwarded["host"]) else headers.get("host", "")
    match = _HOST.fullmatch(host)
    port = forwarded["port"]
    if (
        match
        and not match["port"]
        and port.isascii()
        and port.isdigit()
        and len(port) <= 5
        and port not in _DEFAULT_PORTS
    ):
        host = f"{host}:{int(port)}" if int(port) < 65536 else host
    if match:
        scope.setdefault("state", {})["sent_host"] = headers.get("host", "")
        MutableHeaders(scope=scope)["host"] = host
    prefix = forwarded["prefix"].rstrip("/")
    if _PREFIX.fullmatch(prefix):
        scope["root_path"] = prefix
        scope["path"] = prefix + scope["path"]


def _first(headers: Headers, name: str) -> str:
    return ",".join(headers.getlist(name)).partition(",")[0].strip()


def _listening(scope: Scope) -> str:
    host, port = scope.get("server") or ("localhost", None)
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{port}" if port else str(host)


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in text.split(",") if entry.strip()]
