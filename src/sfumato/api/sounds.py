"""Sound: `POST /v1/audio/generate` with vLLM-Omni's fields, and LocalAI's `POST /v1/sound-generation`.

Both answer with the file itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from pydantic import AliasChoices, ConfigDict, Field, create_model

from sfumato.api.dependencies import Context, TheContext
from sfumato.api.fields import BLANK, NUMBER, KeepAlive, Priority, Seed, Text, openai_field
from sfumato.api.http import documents
from sfumato.api.http.auth import caller_of
from sfumato.api.http.forms import openapi_body, reader
from sfumato.api.keeping import file_headers, file_keeper
from sfumato.api.lora_fields import LoraFields
from sfumato.api.openai import answers
from sfumato.api.openai.pictures import Pictures
from sfumato.core import INTERACTIVE, MAX_SEED
from sfumato.errors import InvalidRequest
from sfumato.formats import AUDIO, FORMATS, SOUND, check, of_kind
from sfumato.sampling import MAX_PROMPT, PARAMETERS, Sampling
from sfumato.serving.planning import RANDOM_SEED, ImageRequest
from sfumato.serving.service import Service

FIELD_PARAMETERS = tuple(each for each in PARAMETERS if AUDIO in each.of and each.name != "seconds")
"""Each is a field of its own; the length has other names."""


class _Common(LoraFields):
    model_config = ConfigDict(extra="allow", protected_namespaces=(), populate_by_name=True)

    model: Text = Field(
        None,
        validation_alias=AliasChoices("model", "model_id"),
        description="A name from /v1/models; absent: the default model if it makes sound, else the first that does. "
        "Also `model_id`.",
    )
    seconds: Annotated[Annotated[float, Field(gt=0)] | None, NUMBER] = Field(
        None,
        validation_alias=AliasChoices("seconds", "audio_length", "duration_seconds", "duration"),
        description="Length in seconds, to the sample; absent: the model's own. Also `audio_length`, "
        "`duration_seconds` and `duration`.",
        examples=[5.0],
    )
    response_format: Text = Field(None, description=f"One of {', '.join(of_kind(AUDIO))}; absent: {SOUND}.")
    seed: Seed = Field(
        None, description=f"{RANDOM_SEED} or absent: random; the file's recipe has it. At most {MAX_SEED}."
    )
    audio_reference: Pictures = Field(
        [],
        max_length=1,
        description="A sound that the result is made from, or sounds like, as the model takes it (`audio` in its "
        '`inputs`): `{"audio_url": ...}`, base64, data: URI, http(s) URL or `{file_id}`; in a form, a file.',
    )
    keep_alive: KeepAlive = Field(
        None, description="How long the model stays in memory once it is idle, as for pictures.", examples=["5m"]
    )
    priority: Priority = INTERACTIVE


if TYPE_CHECKING:
    _Sampled = _Common
else:
    _Sampled = create_model(
        "_Sampled", __base__=_Common, **{each.name: openai_field(each) for each in FIELD_PARAMETERS}
    )


class _SoundBody(_Sampled):
    """What both routes take besides their prompt."""

    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = ()
    """Fields of other servers without meaning here; if sent, a header lists them."""

    def ignored(self) -> list[str]:
        """Fields that were sent but have no effect."""
        without = [name for name in self.WITHOUT_EFFECT if getattr(self, name, None) is not None]
        return [*(self.model_extra or {}), *without]

    def format(self) -> str:
        """Raises InvalidRequest for a format that is not known, or that cannot be written here."""
        name = (self.response_format or SOUND).strip().lower()
        check(name, AUDIO, "response_format")
        return name

    def sampling(self) -> Sampling:
        values = {each.name: getattr(self, each.name) for each in FIELD_PARAMETERS}
        return Sampling(**values, seconds=self.seconds)

    def to_request(self, **more: Any) -> ImageRequest:
        return ImageRequest(
            **{
                "model": self.model,
                "n": 1,
                "seed": self.seed,
                "sampling": self.sampling(),
                "format": self.format(),
                "keep_alive": self.keep_alive,
                "priority": self.priority,
                "audio": self.audio_reference[0] if self.audio_reference else None,
                "audio_field": "audio_reference",
                "loras": self.all_loras,
                "replace_loras": bool(self.replace_loras),
            }
            | more
        )


class GenerateBody(_SoundBody):
    """Of `POST /v1/audio/generate`."""

    input: str = Field(max_length=MAX_PROMPT, description="What to hear.", examples=["rain on a roof"])
    stream_format: Annotated[Literal["audio"] | None, BLANK] = Field(None, description="The file, in one piece.")
    speed: Annotated[Annotated[float, Field(ge=1, le=1)] | None, NUMBER] = Field(
        None, description="Only 1: a sound is not stretched."
    )
    audio_start: Annotated[Annotated[float, Field(ge=0, le=0)] | None, NUMBER] = Field(
        None, description="Only 0: a sound has its beginning."
    )

    def to_request(self, **more: Any) -> ImageRequest:
        return super().to_request(prompts=[self.input], **more)


class SoundGenerationBody(_SoundBody):
    """Of `POST /v1/sound-generation`."""

    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = ("prompt_influence", "do_sample", "think")

    text: str = Field("", max_length=MAX_PROMPT, description="What to hear.", examples=["rain on a roof"])
    caption: str = Field("", max_length=MAX_PROMPT, description="The same, if it is there.")
    vocal_language: Text = Field(
        None,
        max_length=20,
        validation_alias=AliasChoices("vocal_language", "language"),
        description="Language of `lyrics`; also `language`.",
    )
    instrumental: Annotated[bool | None, BLANK] = Field(None, description="Without `lyrics`, as without this field.")
    prompt_influence: Any = Field(None, description="Without effect: use `guidance_scale`.")
    do_sample: Any = Field(None, description="Without effect: set `seed`.")
    think: Any = Field(None, description="Without effect: no language model writes the prompt.")

    def to_request(self, **more: Any) -> ImageRequest:
        if not (prompt := self.caption or self.text):
            raise InvalidRequest("text: what to hear is missing; send it as `text` or `caption`", param="text")
        if self.instrumental and self.sampling().lyrics:
            raise InvalidRequest("instrumental: there are lyrics too; leave one of them out", param="instrumental")
        return super().to_request(prompts=[prompt], **more)


routes = APIRouter(tags=["Sound"])

RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The sound",
        "content": {
            FORMATS[name].media_type: {"schema": {"type": "string", "format": "binary"}} for name in of_kind(AUDIO)
        },
    },
    **documents.ACCEPTED,
    **documents.errors(*documents.REASONS),
}


@routes.post(
    "/audio/generate",
    summary="Make a sound, and answer with its file",
    openapi_extra=openapi_body(GenerateBody),
    response_class=Response,
    responses=RESPONSES,
)
async def generate(body: Annotated[GenerateBody, Depends(reader(GenerateBody))], context: TheContext) -> Response:
    return await _answer(context, body)


@routes.post(
    "/sound-generation",
    summary="Make a sound, in LocalAI's and ElevenLabs' form",
    openapi_extra=openapi_body(SoundGenerationBody),
    response_class=Response,
    responses=RESPONSES,
)
async def sound_generation(
    body: Annotated[SoundGenerationBody, Depends(reader(SoundGenerationBody))], context: TheContext
) -> Response:
    return await _answer(context, body)


async def _answer(context: Context, body: GenerateBody | SoundGenerationBody) -> Response:
    service = context.service
    keep = file_keeper(context.gallery, caller_of(context.request), body.format(), required=False)
    more = context.origin | {"model": body.model or await _first_of_sound(service), "keep": keep}

    async def make() -> Response:
        request = body.to_request(**more)
        body.audio_reference = []  # a body lives until its request is answered
        job = await service.submit(request)
        del request
        (done,) = await answers.all_pictures(job, context.gallery)
        headers = answers.warning_headers(body.ignored(), [done]) | file_headers(job, done)
        return Response(done.file, media_type=FORMATS[done.format].media_type, headers=headers)

    return await answers.unless_gone(context.request, make())


async def _first_of_sound(service: Service) -> str | None:
    """The default model if it makes sound, else the first that does; None: no model is known to."""
    service.catalog.refresh()
    for config in (service.catalog.get(None), *service.catalog.all()):
        abilities = await service.abilities(config)
        if abilities and abilities.kind == AUDIO:
            return config.name
    return None
