"""What OpenAPI says of answers: their shapes, and every status that a route can give."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    message: str = Field(description="What is wrong, with what is valid and what to do.")
    type: str
    param: str | None = Field(description="The field at fault.")
    code: str | None


class Error(BaseModel):
    """Every error of every route."""

    error: ErrorDetail


class PictureItem(BaseModel):
    """Exactly one of `url` and `b64_json`."""

    url: str | None = None
    b64_json: str | None = None
    seed: int = Field(description="Draws this picture again.")


class InputTokens(BaseModel):
    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int = Field(description="One for each 16x16 pixels.")
    total_tokens: int


class Images(BaseModel):
    """All the pictures of a request."""

    created: int = Field(description="Seconds since 1970.")
    data: list[PictureItem]
    background: str
    output_format: str
    quality: str
    size: str
    usage: Usage


class ModelDefaults(BaseModel):
    """What holds where a request says nothing; null: the model decides, and says it once it is loaded."""

    size: str | None
    steps: int | None
    guidance_scale: float | None
    scheduler: str | None
    negative_prompt: str | None
    clip_skip: int | None
    strength: float | None
    n: int
    seed: int | None


class ModelLimits(BaseModel):
    n: int
    steps: int
    pixels: int
    size_multiple: int | None
    prompt_tokens: int | None
    max_concurrent: int | None


class ModelExtension(BaseModel):
    """What Sfumato knows of a model beyond OpenAI's object."""

    status: str
    detail: str
    progress: float | None = Field(description="0 to 1 while it is downloaded.")
    aliases: list[str]
    description: str | None
    pipeline: str | None = Field(description="diffusers class; null until it is known.")
    tasks: list[str] | None = Field(
        description="Read from its files; null where none is on this disk and it was not loaded yet."
    )
    enable_parameters: list[str]
    defaults: ModelDefaults
    limits: ModelLimits
    qualities: dict[str, int] = Field(description="`quality` → steps, as far as they are known.")


class Model(BaseModel):
    id: str
    object: str
    created: int
    owned_by: str
    sfumato: ModelExtension


class Models(BaseModel):
    object: str
    data: list[Model]


class Scheduler(BaseModel):
    id: str = Field(description="For `scheduler` in a request.")
    object: str
    description: str


class Schedulers(BaseModel):
    object: str
    data: list[Scheduler]


class KeptPicture(BaseModel):
    """A picture of a request that is done and lies at /generated-images/{name}."""

    index: int
    name: str
    seed: int


class PreviewPicture(BaseModel):
    """A picture as it stands after `step`, as PNG."""

    index: int
    step: int
    b64_json: str


class ProgressState(BaseModel):
    """Where a request stands."""

    id: str
    object: str
    model: str
    prompt: str = Field(description="Of its first picture.")
    status: str = Field(description="queued, drawing, completed, failed or cancelled.")
    step: int = Field(description="Denoising steps done, of all its pictures.")
    total: int
    pictures: int
    pictures_done: int
    queue_position: int = Field(description="Turns until its next picture is drawn; 0: none waits.")
    seconds_left: float | None = Field(description="Estimated; null while nothing is known.")
    kept: list[KeptPicture]
    error: ErrorDetail | None = Field(description="Why it ended without its pictures.")
    preview: PreviewPicture | None = Field(description="Where it was asked for and there is one.")


class ProgressList(BaseModel):
    object: str
    data: list[ProgressState]


REASONS = {
    400: "A field is wrong; the message names it, its value and what is valid",
    401: "Keys are configured and none of them came",
    403: "A web page of another origin asks, or a browser by a name that is not the server's",
    404: "No such model, request or picture",
    413: "The body is too large",
    415: "The body is of a kind that is not read",
    429: "Too much waits already; `retry-after` says when to come again",
    499: "Cancelled",
    500: "The model file is wrong, the model cannot be loaded or it drew nothing that can be shown",
    503: "The weights could not be downloaded, or the worker died twice",
    504: "Not drawn within the time limit",
    507: "The picture could not be written, or the gallery's index not be used",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Error, "description": REASONS[status]} for status in statuses}


DRAWING: dict[int | str, dict[str, Any]] = {
    200: {"model": Images, "description": "The pictures"},
    **errors(*REASONS),
}
"""Of routes that draw."""

STREAMING: dict[int | str, dict[str, Any]] = {
    **DRAWING,
    200: {
        "model": Images,
        "description": "The pictures; with `stream: true` events, each `data:` line a JSON object",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
}
