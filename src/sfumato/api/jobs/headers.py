"""The request headers that make a job: `Prefer: respond-async` and `Idempotency-Key`; and what one request is."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Scope

from sfumato.api.http import content_type
from sfumato.errors import InvalidRequest, UnsupportedMedia

MAX_KEY = 255
"""Characters of an `Idempotency-Key`."""

MAX_WAIT_S = 60
"""Longest time that `Prefer: respond-async, wait=N` waits for the answer."""

WEBHOOK = "x-webhook-url"
"""Header with the URL that is told of the end of a job or a batch."""

_PREFERENCES = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*+(?:"|$))++')
"""Of RFC 7240's comma-separated list: `name=value; parameters`. A comma within quotes separates nothing. Nothing
backtracks: a header that does not match takes no longer than one that does."""

_QUOTED_PAIR = re.compile(r'\\(["\\])')
"""Within quotes: a quotation mark, or a backslash."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What these headers ask for."""

    respond_async: bool = False
    wait_s: float = 0.0
    """With `respond_async`: how long to wait for the answer before the 202."""
    key: str = ""
    """The `Idempotency-Key`; empty: none."""
    webhook: str | None = None
    """The URL that is told of its end."""


def wishes(scope: Scope, *, always: bool = False) -> Wishes | None:
    """None for a request that is no job. Raises InvalidRequest for an invalid key, or a webhook of no job.

    `always`: requests of its path are jobs also without `Prefer: respond-async`.
    """
    names = {name for name, _ in scope["headers"]}
    if names.isdisjoint((b"idempotency-key", b"prefer", WEBHOOK.encode())):
        return Wishes(respond_async=True) if always else None
    headers = Headers(scope=scope)
    webhook = webhook_of(headers)
    preferences = _preferences(",".join(headers.getlist("prefer")))
    keys = headers.getlist("idempotency-key")
    respond_async = always or "respond-async" in preferences
    if webhook is not None and not respond_async:
        raise InvalidRequest(f"{WEBHOOK}: send `Prefer: respond-async`, too; others get their answer", param=WEBHOOK)
    if not respond_async and not keys:
        return None
    if len(keys) > 1:
        raise _wrong_key(f"the header occurs {len(keys)} times")
    wait = preferences.get("wait", "")
    # Python reads no number of thousands of digits; the largest that counts has fewer than 9.
    wait_s = min(int(wait.lstrip("0")[:9] or "0"), MAX_WAIT_S) if wait.isascii() and wait.isdigit() else 0
    return Wishes(respond_async, wait_s, _key(keys[0]) if keys else "", webhook)


def webhook_of(headers: Headers) -> str | None:
    """The URL that is to be told. Raises InvalidRequest for more than one."""
    urls = headers.getlist(WEBHOOK)
    if len(urls) > 1:
        raise InvalidRequest(f"{WEBHOOK}: the header occurs {len(urls)} times; send it once", param=WEBHOOK)
    return urls[0] if urls else None


def _preferences(text: str) -> dict[str, str]:
    """Name in lower case → value. The first of a name counts; parameters are of no preference that we know."""
    found: dict[str, str] = {}
    for preference in _PREFERENCES.findall(text):
        name, _, value = preference.partition(";")[0].partition("=")
        found.setdefault(name.strip().lower(), value.strip().strip('"'))
    return found


def _key(text: str) -> str:
    """The draft's is a quoted string; most clients send it without quotes."""
    key = text.strip()
    if len(key) > 1 and key[0] == key[-1] == '"':
        key = _QUOTED_PAIR.sub(r"\1", key[1:-1])
    if not 0 < len(key) <= MAX_KEY:
        raise _wrong_key(f"{len(key)} characters" if key else "it is empty")
    if not (key.isascii() and key.isprintable()):
        raise _wrong_key("it has other characters than printable ASCII")
    return key


def _wrong_key(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"Idempotency-Key: {why}; 1 to {MAX_KEY} printable ASCII characters, such as a UUID, are valid",
        param="Idempotency-Key",
    )


def key_digest(owner: str, key: str) -> str:
    """What stands for a key of one caller."""
    return hashlib.sha256(f"{owner}\0{key}".encode()).hexdigest()


def fingerprint(scope: Scope, body: bytes) -> str:
    """The same for the same request: method, path, query, type, webhook, body. Boundaries of forms differ each time."""
    header = Headers(scope=scope).get("content-type", "")
    try:
        media = content_type.parse(header)
        kind, boundary = media.type, media.parameters.get("boundary", "").encode()
    except UnsupportedMedia:
        kind, boundary = header, b""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    digest = hashlib.sha256()
    webhook = Headers(scope=scope).get(WEBHOOK, "").encode()
    for part in (scope["method"].encode(), path.encode(), scope["query_string"], kind.encode(), webhook):
        digest.update(part + b"\0")
    if kind != "multipart/form-data" or not boundary:
        digest.update(body)
        return digest.hexdigest()
    for piece in (b"\r\n" + body).split(b"\r\n--" + boundary):  # a boundary of one letter is in every text
        digest.update(len(piece).to_bytes(8))
        digest.update(piece)
    return digest.hexdigest()
