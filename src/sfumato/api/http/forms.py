"""Parse a request's body into one of `bodies`: from JSON, or from a form with the same fields.

Parsing time grows with the body, so it happens in separate threads: it does not delay other requests, and
decoding pictures does not delay it.
"""

from __future__ import annotations

import asyncio
import codecs
import functools
import re
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import AliasChoices, BaseModel, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError, from_json

from sfumato.api.http import body_cost, content_type, multipart
from sfumato.errors import InvalidRequest, UnsupportedMedia, did_you_mean

Body = TypeVar("Body")

THREADS = 2
"""Threads that parse bodies. Parsing holds the GIL, so more would not be faster."""

FORMS = (content_type.MULTIPART, content_type.URLENCODED)

_NESTED = re.compile(r"(\w+)\[(\w*)\]")
"""`image[]` is an item of a list, `key[sub]` a value of an object."""

_OBJECT_BEGINS = re.compile(rb"\s*\{")

_MARK = codecs.BOM_UTF8
"""Byte order mark that some editors and shells prepend to a text."""


class Bodies:
    """Parses bodies for one application. `most_text`: maximum bytes besides pictures."""

    def __init__(self, max_text: int) -> None:
        self._max_text = max_text
        self._pool: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """Stop the threads; the next body starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    async def read(self, request: Request, validate: Callable[[Any], Body], picture: str = "") -> Body:
        """The body as returned by `validate`. Raises InvalidRequest, or RequestValidationError naming the field.

        `picture`: the field for a body that is the file of a picture; empty: such a body is refused.
        """
        media = content_type.parse(request.headers.get("content-type", ""))
        body = bytearray()  # not `request.body()`, which keeps both its chunks and the whole
        async for chunk in request.stream():
            body += chunk
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, "bodies")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._read, media, body, validate, picture)

    def _read(self, media: content_type.Media, body: bytearray, validate: Callable[[Any], Body], picture: str) -> Body:
        try:
            if picture and _is_file(media, body):
                return validate({picture: bytes(body)})
            return validate(self._values(media, body))
        except ValidationError as error:
            errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
            raise RequestValidationError(errors) from None

    def _values(self, media: content_type.Media, body: bytearray) -> dict[str, Any]:
        codec = media.codec
        body = body.removeprefix(_MARK)
        if media.type == content_type.MULTIPART:
            return _of_form(multipart.parts(body, media, self._max_text))
        if media.type == content_type.URLENCODED and not _OBJECT_BEGINS.match(body):
            body_cost.check_urlencoded(body, self._max_text)
            return _of_form(parse_qsl(body.decode("latin-1"), keep_blank_values=True, encoding=codec))
        # `curl -d` sends JSON with the type of a form.
        if media.type != content_type.URLENCODED and not content_type.is_json(media.type):
            raise UnsupportedMedia(
                f"content-type: {media.type[:100]!r} is not supported; use application/json, {' or '.join(FORMS)}"
            )
        body_cost.check_json(body, self._max_text)
        return _of_json(body if codec == "utf-8" else body.decode(codec).encode())


def reader(kind: type[BaseModel], *, optional: bool = False, picture: str = "") -> Callable[[Request], Awaitable[Any]]:
    """A dependency that parses a body of this type. Raises RequestValidationError naming the field.

    `optional`: a request without a body is one without fields. `picture`: as in `Bodies.read`.
    """

    async def read(request: Request) -> Any:
        if (
            optional
            and request.headers.get("content-length", "0") == "0"
            and "transfer-encoding" not in request.headers
        ):
            return kind()
        return await _bodies(request).read(request, functools.partial(_validated, kind), picture)

    return read


def _validated(kind: type[BaseModel], values: dict[str, Any]) -> Any:
    """The body. Raises InvalidRequest for a field that it does not have, if it takes no others."""
    if kind.model_config.get("extra") == "forbid":
        for name in values.keys() - kind.model_fields.keys():
            near = did_you_mean(name, kind.model_fields)
            known = ", ".join(kind.model_fields)
            raise InvalidRequest(f"{name[:100]}: this route has no such field.{near} It has: {known}", param=name[:100])
    return kind.model_validate(values)


async def read_object(request: Request) -> dict[str, Any]:
    """A dependency that parses any JSON object."""
    return await _bodies(request).read(request, _OBJECT.validate_python)


_OBJECT = TypeAdapter(dict[str, Any])


def openapi_body(kind: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """Its OpenAPI description: the same fields as JSON and as a form, each with all its aliases."""
    schema = kind.model_json_schema()
    schema = _inlined(schema, schema.pop("$defs", {}))
    for name, info in kind.model_fields.items():
        if isinstance(info.validation_alias, AliasChoices):
            also = [alias for alias in info.validation_alias.choices if isinstance(alias, str) and alias != name]
            field_schema = {
                key: value for key, value in schema["properties"][name].items() if key not in ("title", "examples")
            }
            schema["properties"] |= {alias: field_schema | {"description": f"Alias of `{name}`."} for alias in also}
            if name in schema.get("required", ()):
                schema["required"].remove(name)
                any_of = [{"required": [each]} for each in (name, *also)]
                schema.setdefault("allOf", []).append({"anyOf": any_of})
    content = {type: {"schema": schema} for type in ("application/json", FORMS[0])}
    return {"requestBody": {"required": required, "content": content}}


def openapi_json(kind: type[BaseModel]) -> dict[str, Any]:
    """Its OpenAPI description as JSON alone: clients of other APIs send no forms."""
    body = openapi_body(kind)["requestBody"]
    return {"requestBody": body | {"content": {"application/json": body["content"]["application/json"]}}}


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    """A schema without references: FastAPI does not collect the parts of one that it has not made."""
    if isinstance(schema, list):
        return [_inlined(each, parts) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        schema = parts[schema["$ref"].rpartition("/")[2]]
    return {key: _inlined(value, parts) for key, value in schema.items()}


def _bodies(request: Request) -> Bodies:
    bodies = request.app.state.bodies
    assert isinstance(bodies, Bodies)
    return bodies


def _is_file(media: content_type.Media, body: bytearray) -> bool:
    """Whether a body is no text: by its type, or without one by how it begins."""
    if media.type == "":
        return bool(body) and not _OBJECT_BEGINS.match(body.removeprefix(_MARK))
    return media.type.startswith("image/") or media.type == content_type.BYTES


def _of_json(body: bytes | bytearray) -> dict[str, Any]:
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestValidationError([{"type": "json_invalid", "loc": ("body",), "msg": str(error)}]) from None
    if not isinstance(values, dict):
        wrong = PydanticCustomError("dict_type", "must be a JSON object")
        raise RequestValidationError([{"type": wrong.type, "loc": ("body",), "msg": wrong.message(), "input": values}])
    return values


def _of_form(fields: Iterable[tuple[str, str | bytes]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in fields:
        nested = _NESTED.fullmatch(key)
        name, inner = (nested[1], nested[2]) if nested else (key, "")
        if inner:
            existing = values.setdefault(name, {})
            if isinstance(existing, dict):
                existing[inner] = value
        elif name in values:
            existing = values[name]
            if isinstance(existing, list):
                existing.append(value)
            else:
                values[name] = [existing, value]
        else:
            values[name] = [value] if nested else value
    return values
