"""API keys: who may call, and who is calling.

A key is sent as `Authorization: Bearer KEY` (OpenAI's clients), as the password of `Authorization: Basic`
with its name as the user (AUTOMATIC1111's clients), or as `x-api-key: KEY`.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Callable, Iterator, Mapping

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sfumato.api.http import errors
from sfumato.errors import Unauthorized

OPEN = ("/healthz", "/readyz", "/", "/docs", "/openapi.json")
"""Paths that may be read without a key: health checks, and static contents that are the same on every server."""

READS = ("GET", "HEAD", "OPTIONS")

OPEN_BELOW = ("/generated-images/", "/docs/", "/studio/")
"""The same for everything below. Picture names cannot be guessed, and clients fetch them without a key."""


def caller_of(request: Request) -> str:
    """The name of the caller's key; without keys its address. The queue is fair by this name."""
    caller: str = request.scope["state"]["caller"]
    return caller


def parse_keys(text: str) -> dict[str, str]:
    """Parse the setting api_keys: name → key. Raises ValueError naming the entry at fault without showing a key."""
    keys: dict[str, str] = {}
    for number, entry in enumerate(text.split(",") if text.strip() else (), 1):
        name, colon, key = (part.strip() for part in entry.partition(":"))
        where = f"api_keys: entry {number}"
        if not colon:
            raise ValueError(f"{where} has no colon; write NAME:KEY, without commas in either")
        if not name or not key:
            raise ValueError(f"{where} has an empty {'key' if name else 'name'}; write NAME:KEY")
        if not (name + key).isprintable() or any(character.isspace() for character in name + key):
            raise ValueError(f"{where} contains a space; write NAME:KEY, with commas between entries")
        if name in keys:
            raise ValueError(f"{where} repeats the name {name!r}; names identify callers and must differ")
        if key in keys.values():
            raise ValueError(f"{where} ({name!r}) has the same key as another name; each needs its own")
        keys[name] = key
    return keys


class Auth:
    """ASGI middleware: refuses requests without one of `keys`, and records the caller. No keys: anyone may call.

    `rejected` is called with the code of each refusal.
    """

    def __init__(self, app: ASGIApp, keys: Mapping[str, str], rejected: Callable[[str], None]) -> None:
        self.app = app
        self._rejected = rejected
        self._keys = {name: key.encode() for name, key in keys.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        caller = self._caller(headers) if self._keys else _address(scope)
        if caller is None and not is_open(scope, headers):
            error = _refusal(headers)
            self._rejected(error.code)
            await errors.response(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = _address(scope) if caller is None else caller
        await self.app(scope, receive, send)

    def _caller(self, headers: Headers) -> str | None:
        for user, key in _credentials(headers):
            name = self._name_of(key)
            if name is not None and user in (None, name):
                return name
        return None

    def _name_of(self, candidate: bytes) -> str | None:
        """Compares with every key in constant time, so that timing reveals nothing about them."""
        match = None
        for name, key in self._keys.items():
            if hmac.compare_digest(key, candidate):
                match = name
        return match


def _credentials(headers: Headers) -> Iterator[tuple[str | None, bytes]]:
    """User name, if one was sent, and key."""
    for value in headers.getlist("authorization"):
        scheme, _, rest = value.strip().partition(" ")
        rest = rest.strip()
        match scheme.lower():
            case "bearer":
                yield None, _bytes(rest)
            case "basic":
                try:
                    user, colon, key = base64.b64decode(rest, validate=True).partition(b":")
                except (binascii.Error, ValueError):
                    continue
                if colon:
                    yield user.decode("utf-8", "replace"), key
    for value in headers.getlist("x-api-key"):
        yield None, _bytes(value.strip())


def _bytes(value: str) -> bytes:
    """The original bytes: starlette decodes headers as Latin-1."""
    return value.encode("latin-1")


def is_open(scope: Scope, headers: Headers) -> bool:
    """Whether the request needs no key: by its path, or because it is a CORS preflight."""
    if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
        return True  # browsers send the preflight without the key
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return scope["method"] in READS and (path in OPEN or path.startswith(OPEN_BELOW))


def has_explicit_key(headers: Headers) -> bool:
    """Whether it has a key that browsers do not add on their own, unlike with Basic authentication."""
    schemes = (value.strip().partition(" ")[0].lower() for value in headers.getlist("authorization"))
    return "x-api-key" in headers or "bearer" in schemes


def _refusal(headers: Headers) -> Unauthorized:
    sent = "authorization" in headers or "x-api-key" in headers
    problem = "the API key is not valid" if sent else "an API key is required"
    return Unauthorized(
        f"{problem}; send `Authorization: Bearer KEY`, `x-api-key: KEY`, or Basic authentication with the key's "
        "name as user and the key as password. Get a key from the operator (the setting api_keys)."
    )


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""
