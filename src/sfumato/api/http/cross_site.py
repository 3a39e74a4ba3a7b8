"""Which web pages may use this server from their visitors' browsers: only its own, and those in the settings.

A browser sends requests of any page on the internet to `http://localhost:8080`. The page cannot forge three of the
headers: `Origin` (on every POST and DELETE), `Sec-Fetch-Site` (if the address is trustworthy, as localhost is), and
`Host`, which is the attacker's own name if that name was made to point here ("DNS rebinding"). Programs other than
browsers send neither of the first two and are not checked.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sfumato.api.http import auth, errors, urls
from sfumato.errors import Forbidden, SfumatoError, UnsupportedMedia
from sfumato.settings import Settings

RESERVED_SUFFIXES = ("localhost", "local", "internal", "home.arpa", "lan")
"""Suffixes reserved in the public DNS, so no attacker can make such a name point here."""

SAME_SITE = ("same-origin", "none")
"""Values of Sec-Fetch-Site: a page of this server, and an address typed by the user."""

_NAME = re.compile(r"\*|(?:\*\.)?[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252})")


def parse_hosts(text: str) -> list[str]:
    """The setting allowed_hosts. Raises ValueError, unless each word is a name, `*.name` or `*`."""
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"allowed_hosts: {name!r} is not a host name; use e.g. images.example, *.example or *")
    return names


class CrossSite:
    """ASGI middleware: refuses browser requests from web pages of other origins with 403.

    A request with a key that browsers do not send on their own is accepted from anywhere. `rejected` is called with
    the code of each refusal.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, origins: Collection[str], rejected: Callable[[str], None]
    ) -> None:
        self.app = app
        self._open = settings.cross_site
        self._keys = bool(settings.api_keys.strip())
        self._origins = frozenset(origins)
        self._public = _origin_host(settings.public_url)
        own_names = {socket.gethostname().lower(), urlsplit(settings.public_url).hostname or ""}
        self._hosts = frozenset([*parse_hosts(settings.allowed_hosts), *own_names]) - {""}
        self._rejected = rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope) if scope["type"] == "http" and not self._open else None
        if error is None:
            await self.app(scope, receive, send)
        else:
            self._rejected(error.code)
            await errors.response(error)(scope, receive, send)

    def _refusal(self, scope: Scope) -> SfumatoError | None:
        headers = Headers(scope=scope)
        if auth.is_open(scope, headers) or (self._keys and auth.has_explicit_key(headers)):
            return None
        if scope["method"] not in auth.READS and headers.get("content-type", "").lower().lstrip().startswith(
            "text/plain"
        ):
            return UnsupportedMedia(
                "content-type: web pages can send text/plain without a preflight; send application/json"
            )
        origins, sites = headers.getlist("origin"), headers.getlist("sec-fetch-site")
        if not origins and not sites and not _is_browser(headers):
            return None
        if origins and all(origin in self._origins or "*" in self._origins for origin in origins):
            return None
        here = {_origin_host(f"{scope['scheme']}://{headers.get('host', '')}"), self._public} - {None}
        foreign = [origin for origin in origins if _origin_host(origin) not in here]
        if foreign or any(site not in SAME_SITE for site in sites):
            return Forbidden(
                f"web pages of the origin {(foreign or ['?'])[0][:200]!r} may not use this server. The setting "
                "cors_origins lists origins that may; cross_site allows all of them."
            )
        host = urls.sent_host(scope)
        if not self._is_trusted(host) and not (urls.used_https(scope) and sites):
            return Forbidden(
                f"a web browser used the host name {host[:200]!r}, which this server does not know. If the name is "
                "correct, add it to the setting allowed_hosts, or set public_url."
            )
        return None

    def _is_trusted(self, host: str) -> bool:
        """Whether this name is certain not to be an attacker's."""
        if "*" in self._hosts:
            return True
        name = _hostname(host)
        if "." not in name or name in self._hosts:
            return bool(name)
        parents = [name.split(".", count)[-1] for count in range(1, name.count(".") + 1)]
        if any(parent in RESERVED_SUFFIXES or f"*.{parent}" in self._hosts for parent in parents):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _is_browser(headers: Headers) -> bool:
    return "referer" in headers or "mozilla/" in headers.get("user-agent", "").lower()


def _origin_host(origin: str) -> str | None:
    """Host and port without a default port; a proxy in between may have changed the scheme."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    return parts.hostname if port in (None, 80, 443) else f"{parts.hostname}:{port}"


def _hostname(host: str) -> str:
    """Host without port, brackets and trailing dot; an IPv6 address has no dot and counts as a name without one."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""
