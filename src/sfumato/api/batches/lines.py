"""Reads the lines of a batch's input file: all of them, or what is wrong with them, before anything is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json, to_json

from sfumato.api.batches.tables import Line
from sfumato.api.http import body_cost
from sfumato.core import BATCH
from sfumato.errors import InvalidRequest, in_words

ENDPOINTS = ("/v1/images/generations", "/v1/images/edits")
"""What the lines of a batch may request."""

MAX_LINES = 50_000
MAX_CUSTOM_ID = 512
"""Characters."""
MAX_ERRORS = 100
"""Lines at fault that are named."""

NUL = "\0"
"""PostgreSQL stores no text with it."""

KEYS = ("custom_id", "method", "url", "body")


class _Fault(Exception):
    """What is wrong with a line: code, message and the key at fault."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def read(content: bytes, endpoint: str, max_text: int) -> tuple[list[Line], str | None, list[dict[str, Any]]]:
    """The lines, the model that they name, and OpenAI's `errors.data`. If there are errors the lines count for nothing.

    `max_text`: maximum bytes of a line besides its pictures.
    """
    lines: list[Line] = []
    errors: list[dict[str, Any]] = []
    first_lines: dict[str, int] = {}
    models: dict[Any, int] = {}
    number = 0
    for number, text in _numbered(content):
        try:
            if len(first_lines) >= MAX_LINES:
                raise _Fault("too_many_lines", f"a batch has at most {MAX_LINES} lines; split the file")
            custom_id, body = _line(text, endpoint, max_text)
            if (first := first_lines.setdefault(custom_id, number)) != number:
                raise _Fault(
                    "duplicate_custom_id",
                    f"custom_id: {custom_id[:100]!r} is that of line {first}, too; each must be another",
                    "custom_id",
                )
            models.setdefault(body.get("model"), number)
            if len(models) > 1:
                first_model, model = in_words(next(iter(models))), in_words(body.get("model"))
                raise _Fault(
                    "mismatched_model",
                    f"body.model: {model}, and line {min(models.values())} has {first_model}; send one batch for each "
                    "model",
                    "body.model",
                )
            lines.append(Line(position=len(lines), custom_id=custom_id, body=to_json(body | {"priority": BATCH})))
        except _Fault as fault:
            errors.append({"line": number, "code": fault.code, "message": fault.message, "param": fault.param})
            if len(errors) >= MAX_ERRORS or fault.code == "too_many_lines":
                break
    if not number:
        errors.append({"line": None, "code": "empty_file", "message": "the file has no lines", "param": None})
    return lines, next(iter(models), None), errors


def _numbered(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers in the file, the first one 1."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    number = start = 0
    while start < len(content):
        end = content.find(b"\n", start)
        end = len(content) if end < 0 else end
        number += 1
        if text := content[start:end].strip():
            yield number, text
        start = end + 1


def _line(text: bytes, endpoint: str, max_text: int) -> tuple[str, dict[str, Any]]:
    try:
        body_cost.check_json(text, max_text)
        values = from_json(text, allow_inf_nan=False)
    except InvalidRequest as error:
        raise _Fault(error.code, error.message) from None
    except ValueError as error:
        raise _Fault("invalid_json_line", f"this line is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise _Fault("invalid_json_line", f"{in_words(values)}: a line is an object with {', '.join(KEYS)}")
    for key in KEYS:
        if key not in values:
            raise _Fault("missing_required_parameter", f"{key}: this key is required", key)
    if unknown := sorted(values.keys() - set(KEYS)):
        raise _Fault("unknown_parameter", f"{unknown[0][:100]}: a line has {', '.join(KEYS)}", unknown[0][:100])
    custom_id, method, url, body = (values[key] for key in KEYS)
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID or NUL in custom_id:
        said = f"custom_id: {in_words(custom_id)}; 1 to {MAX_CUSTOM_ID} characters without NUL are valid"
        raise _Fault("invalid_custom_id", said, "custom_id")
    if method != "POST":
        raise _Fault("invalid_method", f"method: {in_words(method)}; POST is valid", "method")
    if url != endpoint:
        raise _Fault("invalid_url", f"url: {in_words(url)}; the batch's endpoint is {endpoint}", "url")
    if not isinstance(body, dict):
        raise _Fault("invalid_request", f"body: {in_words(body)}; the fields of a request are valid", "body")
    if not isinstance(body.get("model"), str | None) or NUL in (body.get("model") or ""):
        raise _Fault("invalid_request", f"body.model: {in_words(body['model'])}; a name is valid", "body.model")
    if body.get("stream"):
        raise _Fault("invalid_request", "body.stream: an answer in a file is no stream; leave it out", "body.stream")
    return custom_id, body
