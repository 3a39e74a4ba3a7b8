"""Partial responses from memory, according to RFC 9110: `Range`, `If-Range`, `If-None-Match`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fastapi import Request
from starlette.responses import Response

from sfumato.api.http import errors
from sfumato.errors import InvalidRequest

_ONE = re.compile(r"bytes\s*=\s*(?:([0-9]{1,15})\s*-\s*([0-9]{1,15})?|-\s*([0-9]{1,15}))", re.IGNORECASE)
"""first-last, first-, and -suffix. Any other range gets the complete response, which the RFC allows."""


def answer(request: Request, data: bytes, media_type: str, *, etag: str, headers: Mapping[str, str]) -> Response:
    """The complete `data`, the requested range, or 304 if the client has it."""
    common = {**headers, "etag": etag, "accept-ranges": "bytes"}
    etags = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if etag in etags or "*" in etags:
        return Response(status_code=304, headers=common)
    match = _ONE.fullmatch(request.headers.get("range", "").strip())
    if match is None or request.headers.get("if-range", etag) != etag:
        return Response(data, media_type=media_type, headers=common)
    first, last, final = (None if number is None else int(number) for number in match.groups())
    start = max(0, len(data) - final) if final is not None else first or 0
    end = len(data) if last is None else min(last + 1, len(data))
    if first is not None and last is not None and last < first:  # not a valid range
        return Response(data, media_type=media_type, headers=common)
    if start >= end:
        response = errors.response(InvalidRequest(f"range: outside the picture, which has {len(data)} bytes"))
        response.status_code = 416
        response.headers["content-range"] = f"bytes */{len(data)}"
        return response
    common["content-range"] = f"bytes {start}-{end - 1}/{len(data)}"
    return Response(data[start:end], status_code=206, media_type=media_type, headers=common)
