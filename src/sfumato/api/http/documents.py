"""Responses in OpenAPI: their shapes, and every status that a route can return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, create_model

from sfumato.sampling import PARAMETERS


class ErrorDetail(BaseModel):
    message: str = Field(description="What is wrong, what is valid and what to do.")
    type: str
    param: str | None = Field(description="The field at fault.")
    code: str | None


class Error(BaseModel):
    """The error shape of every route."""

    error: ErrorDetail


class ErrorText(BaseModel):
    """The shape of APIs whose clients show a text only."""

    error: str


class PictureItem(BaseModel):
    """Has exactly one of `url` and `b64_json`."""

    url: str | None = None
    b64_json: str | None = None
    seed: int = Field(description="Reproduces this picture.")


class InputTokens(BaseModel):
    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int = Field(description="One per 16x16 pixels.")
    total_tokens: int


class Images(BaseModel):
    """All pictures of a request."""

    created: int = Field(description="Seconds since 1970.")
    data: list[PictureItem]
    background: str
    output_format: str
    quality: str
    size: str
    usage: Usage


class _Defaults(BaseModel):
    """Defaults for requests; null: the model's own, known once it is loaded."""

    size: str | None
    n: int
    seed: int | None


if TYPE_CHECKING:
    ModelDefaults = _Defaults
else:
    ModelDefaults = create_model(
        "ModelDefaults",
        __base__=_Defaults,
        __doc__=_Defaults.__doc__,
        **{each.name: (each.kind | None, ...) for each in PARAMETERS if not each.side},
    )


class ModelLimits(BaseModel):
    n: int
    steps: int
    pixels: int
    size_multiple: int | None
    prompt_tokens: int | None
    max_concurrent: int | None
    frames: int | None = Field(description="Most frames of a clip; null if it makes none.")
    frame_step: int | None = Field(description="Frames of a clip are one more than a multiple of this.")
    seconds: float | None = Field(description="Longest clip or sound; null if it makes none.")
    sample_rate: int | None = Field(description="Samples a second of a sound.")


class ModelInput(BaseModel):
    """A field of requests that the model takes."""

    name: str = Field(description="prompt, image, mask or controls.")
    required: bool
    least: int
    most: int | None = Field(description="null: as many as the server allows.")
    roles: list[str] = Field(description="What they are for, in the order in which they are sent.")


class ModelRunner(BaseModel):
    module: str = Field(description="Component of the pipeline, e.g. `unet`, `vae`.")
    runner: str = Field(
        description="`eager`, `auto` (not chosen yet), `openvino-bf16`, `compile-fp32`, `parallel-2` ..."
    )
    detail: str = Field(
        description="What was measured, why it is eager, or what it does not serve; empty if there is nothing to say."
    )


class ModelControlNets(BaseModel):
    """ControlNets that requests may name."""

    kind: str = Field(alias="class", description="diffusers class of the ControlNet.")
    most: int = Field(description="How many at a time.")
    mode: bool = Field(description="Whether `mode` of a control is read, for nets that know several kinds.")


class ModelExtension(BaseModel):
    """Sfumato's additions to OpenAI's model object."""

    status: str
    detail: str
    progress: float | None = Field(description="0 to 1 while downloading.")
    memory_bytes: int | None = Field(
        description="What its weights take in memory, also those it shares; null if it is not loaded."
    )
    devices: dict[str, str] = Field(
        description="`status` on each device that knows of it; names are those of `devices` in `/v1/status`."
    )
    aliases: list[str]
    description: str | None
    pipeline: str | None = Field(description="diffusers class; null until known.")
    tasks: list[str] | None = Field(
        description="Of text-to-image, label-to-image (the prompt is a class's name or number), image-to-image, "
        "inpainting and upscaling. Read from its files; null if none is on this disk and it was not loaded yet. "
        "Empty if it draws no picture: `detail` says why."
    )
    inputs: list[ModelInput] | None = Field(description="What requests may or must send; null where `tasks` is.")
    control_nets: list[ModelControlNets] | None = Field(
        description="Which ControlNets requests may name in `controls`; empty: none, null: its class is not known yet."
    )
    ip_adapters: bool | None = Field(
        description="Whether requests may name IP-Adapters in `controls`; null until the class is known."
    )
    enable_parameters: list[str]
    defaults: ModelDefaults
    limits: ModelLimits
    savings: list[str] | None = Field(
        description="What saves memory for every picture, as in recipes: `offload`, `group_offload`, `vae_slicing`, "
        "`vae_tiling`, `layerwise_casting:...`, `quantization:...`; null until it is loaded."
    )
    runners: list[ModelRunner] | None = Field(
        description="What computes its denoisers, and why; null until it is loaded. See `accelerate` in model files."
    )
    qualities: dict[str, int] = Field(description="`quality` → steps, as far as known.")
    formats: list[str] | None = Field(
        description="Formats of the files it ends in that can be written here, the default first; pictures are also "
        "converted to others. null where `tasks` is, or where it draws nothing."
    )


class Architecture(BaseModel):
    """As OpenRouter has it."""

    input_modalities: list[str] = Field(description="Of text and image: what requests may send.")
    output_modalities: list[str] = Field(description="image, or nothing if it draws no picture.")


class Model(BaseModel):
    id: str
    object: str
    created: int
    owned_by: str
    architecture: Architecture
    sfumato: ModelExtension


class Models(BaseModel):
    object: str
    data: list[Model]


class ModelCapabilities(Architecture):
    """Of LocalAI's list."""

    id: str
    object: str
    capabilities: list[str] = Field(description="image, upscale")


class AllCapabilities(BaseModel):
    object: str
    data: list[ModelCapabilities]


class ModelFlags(BaseModel):
    """Of the list of LocalAI's page."""

    id: str
    capabilities: list[str] = Field(description="FLAG_IMAGE, FLAG_UPSCALE")
    backend: str


class AllFlags(BaseModel):
    data: list[ModelFlags]


class Scheduler(BaseModel):
    id: str = Field(description="Value for `scheduler` in a request.")
    object: str
    description: str


class Schedulers(BaseModel):
    object: str
    data: list[Scheduler]


class KeptPicture(BaseModel):
    """A finished picture of a request, stored at /generated-images/{name}."""

    index: int
    name: str
    seed: int


class PreviewPicture(BaseModel):
    """Preview of a picture after `step`, as PNG."""

    index: int
    step: int
    b64_json: str


class ProgressState(BaseModel):
    """Progress of a request."""

    id: str
    object: str
    model: str
    prompt: str = Field(description="Prompt of its first picture.")
    status: str = Field(description="queued, drawing, completed, failed or cancelled.")
    step: int = Field(description="Denoising steps completed, over all its pictures.")
    total: int
    pictures: int
    pictures_done: int
    queue_position: int = Field(description="Turns until its next picture is drawn; 0: none is waiting.")
    seconds_left: float | None = Field(description="Estimate; null if unknown.")
    devices: list[str] = Field(
        description="Those that draw its pictures, or have drawn them; empty if the server has one worker."
    )
    kept: list[KeptPicture]
    error: ErrorDetail | None = Field(description="Why it ended without pictures.")
    preview: PreviewPicture | None = Field(description="If requested and available.")


class ProgressList(BaseModel):
    object: str
    data: list[ProgressState]


REASONS = {
    400: "A field is invalid; the message names it, its value and what is valid",
    401: "The server requires an API key, and none or a wrong one was sent",
    403: "The request came from a web page of another origin, or a browser used an unknown host name",
    404: "No such model, request or picture",
    413: "The body is too large",
    415: "The body's content type is not supported",
    422: "The `Idempotency-Key` came with another request before",
    429: "The queue is full; `retry-after` says when to try again",
    499: "Cancelled",
    500: "The model file is invalid, the model cannot be loaded, or drawing failed",
    503: "The weights could not be downloaded, the worker died twice, or the database of jobs cannot be used",
    504: "Not drawn within the time limit, or not begun by the deadline in `x-deadline-ms`",
    507: "The picture could not be written, the gallery's index is not usable, or the model does not fit into memory",
}


def errors(*statuses: int, model: type[BaseModel] = Error) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": model, "description": REASONS[status]} for status in statuses}


ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {"description": "With `Prefer: respond-async`: accepted as a job, which `location` names; see `/v1/jobs/{id}`"}
}
"""Response of every drawing route besides its own."""

DRAWING: dict[int | str, dict[str, Any]] = {
    200: {"model": Images, "description": "The pictures"},
    **ACCEPTED,
    **errors(*REASONS),
}
"""Responses of drawing routes."""

STREAMING: dict[int | str, dict[str, Any]] = {
    **DRAWING,
    200: {
        "model": Images,
        "description": "The pictures; with `stream: true` server-sent events, each `data:` line a JSON object",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
}
