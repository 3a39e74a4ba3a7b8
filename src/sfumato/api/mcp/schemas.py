"""What the tools take: the bodies of the image routes, of which the schemas show what is worth a model's attention.

A schema is read by a language model before every request, so the fields that few need are left out of it. They are
read all the same, as on the other routes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sfumato.api.http.forms import openapi_body
from sfumato.api.openai.bodies import EditsBody, GenerationsBody, PaintBody

SHOWN = (
    "prompt", "model", "n", "size", "seed", "negative_prompt", "steps", "guidance_scale", "scheduler", "quality",
    "output_format", "background",
)  # fmt: skip
OF_EDITS = ("prompt", "image", "mask", "strength", *SHOWN[1:])

OWN: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "model": {"type": "string", "description": "A name from list_models; absent: the default model."},
        "seed": {"type": "integer", "minimum": -1, "description": "-1 or absent: random; the answer has it."},
        "image": {
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
            "description": "The picture to edit, or several if the model takes them: a URL (also of a picture of "
            "this server), a data: URI or base64.",
        },
    }
)
"""Fields that are described otherwise for a language model."""

WAIT = {
    "type": "boolean",
    "default": True,
    "description": "false: answer at once with the request's id, with which get_progress has the pictures later.",
}


def _schema(kind: type[PaintBody], names: tuple[str, ...]) -> dict[str, Any]:
    whole = openapi_body(kind)["requestBody"]["content"]["application/json"]["schema"]
    properties = {name: OWN.get(name) or _plain(whole["properties"][name]) for name in names}
    required = [name for name in ("prompt", "image") if name in names]
    return {"type": "object", "properties": properties | {"wait": WAIT}, "required": required}


def _plain(field: dict[str, Any]) -> dict[str, Any]:
    """Without the branches that a language model need not know: null, files of forms, wrapped URLs."""
    field = {key: value for key, value in field.items() if key not in ("title", "default", "anyOf", "examples")} | {
        key: value for branch in field.get("anyOf", [])[:1] for key, value in branch.items()
    }
    if field.get("type") == "array" or "format" in field or "contentMediaType" in field:
        field = {"description": field.get("description", "")}
    return field if "type" in field else field | {"type": "string"}


GENERATE = _schema(GenerationsBody, SHOWN)
EDIT = _schema(EditsBody, OF_EDITS)
NOTHING: dict[str, Any] = {"type": "object", "properties": {}}
PROGRESS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "description": "Of a request; absent: all your queued and running requests."}
    },
}
