"""A request's body as one of `bodies`: from JSON, or from a form whose keys and strings mean the same."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError, from_json
from starlette.datastructures import FormData, UploadFile

from sfumato.errors import InvalidRequest
from sfumato.service import MAX_PICTURES

Body = TypeVar("Body", bound=BaseModel)

FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
MAX_FIELDS = 200
CHARSETS = ("", "utf-8", "utf8", "us-ascii", "iso-8859-1")

_NESTED = re.compile(r"(\w+)\[(\w*)\]")
"""`image[]` is one of a list, `key[sub]` a value of an object."""


def reader(kind: type[Body]) -> Callable[[Request], Awaitable[Body]]:
    """A dependency that reads a body of this kind. Raises RequestValidationError that names the field."""

    async def read(request: Request) -> Body:
        values = await _values(request)
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
            raise RequestValidationError(found) from None

    return read


def described(kind: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says of it: the same fields as JSON and as a form."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    content = {media: {"schema": schema} for media in ("application/json", FORMS[0])}
    return {"requestBody": {"required": True, "content": content}}


async def _values(request: Request) -> dict[str, Any]:
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media == FORMS[1] and (await request.body()).lstrip().startswith(b"{"):
        media = "application/json"  # what curl sends with -d and no header
    if media in FORMS:
        _refuse_charset(request)
        async with request.form(
            max_files=4 * MAX_PICTURES, max_fields=MAX_FIELDS, max_part_size=_most(request)
        ) as form:
            return await _of_form(form)
    try:
        values = from_json(await request.body(), allow_inf_nan=False)
    except ValueError as error:
        raise RequestValidationError([{"type": "json_invalid", "loc": ("body",), "msg": str(error)}]) from None
    if not isinstance(values, dict):
        wrong = PydanticCustomError("dict_type", "an object is needed")
        raise RequestValidationError([{"type": wrong.type, "loc": ("body",), "msg": wrong.message(), "input": values}])
    return values


def _refuse_charset(request: Request) -> None:
    """A form may name any codec of Python's, and some of them fail or take very long."""
    charset = request.headers.get("content-type", "").lower().partition("charset=")[2].split(";")[0].strip(' "')
    if charset not in CHARSETS:
        raise InvalidRequest(f"content-type: the charset {charset[:40]!r}; utf-8 is valid")


def _most(request: Request) -> int:
    declared = request.headers.get("content-length", "")
    return int(declared) if declared.isdecimal() else 2**30  # the body cap has counted, or counts as it is read


async def _of_form(form: FormData) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, part in form.multi_items():
        value = await part.read() if isinstance(part, UploadFile) else part
        nested = _NESTED.fullmatch(key)
        name, inner = (nested[1], nested[2]) if nested else (key, "")
        if inner:
            held = values.setdefault(name, {})
            if isinstance(held, dict):
                held[inner] = value
        elif name in values:
            held = values[name]
            values[name] = [*held, value] if isinstance(held, list) else [held, value]
        else:
            values[name] = [value] if nested else value
    return values
