"""Request bodies of the image routes. Every field is defined here once, with its limits.

Multipart forms and JSON give the same bodies: in a form every scalar is a string, which pydantic converts, and
a picture is a file. Unlisted fields are kept in `model_extra` without effect.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from sfumato.api.fields import (
    BLANK,
    NUMBER,
    PLAIN,
    KeepAlive,
    PictureCount,
    Priority,
    Seed,
    Text,
    TextOrNumber,
    openai_field,
)
from sfumato.api.lora_fields import LoraFields
from sfumato.api.openai.pictures import Mask, Picture, Pictures
from sfumato.core import INTERACTIVE, MAX_SEED, PREPROCESSORS, QUALITIES, Control
from sfumato.sampling import MAX_PROMPT, OF_PICTURES, Sampling
from sfumato.serving.planning import (
    DEFAULT_PADDING,
    MAX_PADDING,
    MAX_PICTURES,
    RANDOM_SEED,
    ImageRequest,
    size_of,
)

MAX_PARTIAL_IMAGES = 3
MAX_NAME = 300
"""Characters of the name of a ControlNet."""

GPT_FIELDS = ("background", "output_format", "output_compression", "moderation")
PICTURE_FIELDS = ("image", "file", "files", "ref_images", "mask", "controls")
GPT_MODELS = ("gpt-image", "chatgpt-image")
GPT_QUALITIES = ("auto", "low", "medium", "high")


def _of_text(value: Any) -> Any:
    """A list of controls; in a form it is JSON."""
    if isinstance(value, str):
        try:
            value = from_json(value or "[]", allow_inf_nan=False)
        except ValueError:
            raise ValueError('must be a list as JSON, [{"image": "..."}]') from None
    return [value] if isinstance(value, dict) else value or []


class ControlBody(BaseModel):
    """A picture that a ControlNet, an IP-Adapter or an adapter of the model follows."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str | None, BLANK] = Field(
        None,
        max_length=MAX_NAME,
        description="The ControlNet that follows it: a folder in `controlnets/` beside the model files, a path "
        "below it, or a hub id. Or the IP-Adapter: a file in `ip_adapters/`, a path below it, or "
        "`owner/name/file.safetensors` on the hub. Absent: the model file's own.",
    )
    image: Annotated[Pictures, Field(min_length=1, max_length=MAX_PICTURES)] = Field(
        description="Base64, data: URI or http(s) URL; for an IP-Adapter one or a list of them."
    )
    preprocess: Annotated[str | None, BLANK] = Field(
        None,
        description=f"What is made of the picture before it is followed: {', '.join(PREPROCESSORS)}; absent: nothing.",
    )
    weight: Annotated[float, Field(ge=0, le=10), PLAIN] | None = Field(
        None, description="How strongly; absent: the pipeline's own, mostly 1."
    )
    start: Annotated[float, Field(ge=0, le=1), PLAIN] | None = Field(
        None, description="0..1: the part of the steps after which it begins; absent: 0."
    )
    end: Annotated[float, Field(ge=0, le=1), PLAIN] | None = Field(
        None, description="0..1: the part of the steps after which it ends; absent: 1."
    )
    mode: Annotated[int, Field(ge=0, le=100), PLAIN] | None = Field(
        None, description="Number of the kind of control, for nets that know several."
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError('each must be an object, {"image": "..."}')
        if unknown := sorted(map(str, data.keys() - cls.model_fields.keys())):
            raise ValueError(f"{', '.join(unknown)[:200]} is not known; {', '.join(cls.model_fields)} are valid")
        return data

    @field_validator("preprocess")
    @classmethod
    def _known_preprocessor(cls, name: str | None) -> str | None:
        plain = name.strip().lower() if name else None
        if plain in (None, "none"):
            return None
        if plain not in PREPROCESSORS:
            raise ValueError(
                f"none, {', '.join(PREPROCESSORS)} are valid; for others send a picture that is prepared already, "
                "without preprocess"
            )
        return plain

    def to_controls(self) -> list[Control]:
        first, *others = self.image
        control = Control(first, self.weight, self.start, self.end, self.mode, self.name, self.preprocess)
        return [control, *(Control(each, joins=True) for each in others)]


Controls: TypeAlias = Annotated[
    list[ControlBody], BeforeValidator(_of_text, json_schema_input_type=list[ControlBody] | ControlBody | str)
]
Percent: TypeAlias = Annotated[Annotated[int, Field(ge=0, le=100)] | None, NUMBER]
PartialImages: TypeAlias = Annotated[Annotated[int, Field(ge=0, le=MAX_PARTIAL_IMAGES)] | None, NUMBER]

_PROMPT = "What to draw; `positive|negative` (one bar, no braces) also works if the model uses a negative prompt."
PICTURE = "Base64, data: URI, http(s) URL or `{file_id}` of an uploaded one; in a form, a file."


FIELD_PARAMETERS = tuple(each for each in OF_PICTURES if not each.side)
"""Each is a field of its own; width and height are `size`."""


class _Common(LoraFields):
    model_config = ConfigDict(extra="allow", protected_namespaces=(), populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _without_blank_names(cls, data: Any) -> Any:
        """A field that came empty under one of its names does not hide the value under another."""
        if not isinstance(data, dict):
            return data
        names = {name for each in OF_PICTURES if each.aliases for name in (each.name, *each.aliases)}
        if "images" in data and data.get("image") in (None, "", []):
            data = {name: value for name, value in data.items() if name != "image"}
        return {
            name: value
            for name, value in data.items()
            if name not in names or not isinstance(value, str) or value.strip()
        }

    model: Text = Field(None, description="A name from /v1/models; absent: the default model.")
    n: PictureCount = Field(
        None, description="Number of pictures; picture i gets seed + i. The model list has the maximum."
    )
    size: Text = Field(None, description="WIDTHxHEIGHT in pixels, or auto.", examples=["128x128"])
    response_format: Annotated[Literal["url", "b64_json"] | None, BLANK] = Field(
        None, description="Absent: url for generations, b64_json for edits and for gpt-image style requests."
    )
    user: str | None = Field(None, description="An identifier of your own; not used.")
    seed: Seed = Field(
        None, description=f"{RANDOM_SEED} or absent: random; the response contains it. At most {MAX_SEED}, minus n - 1."
    )
    keep_alive: KeepAlive = Field(
        None,
        description="How long the model stays in memory once it is idle, as in Ollama: seconds, a duration such as "
        "`5m`, 0 for not at all, -1 for no limit. Absent: as its model file or the server says.",
        examples=["5m"],
    )
    priority: Priority = INTERACTIVE


if TYPE_CHECKING:
    _Sampled = _Common
else:
    _Sampled = create_model(
        "_Sampled", __base__=_Common, **{each.name: openai_field(each) for each in FIELD_PARAMETERS}
    )


class Body(_Sampled):
    """Common fields of all image routes."""

    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = ("moderation", "style", "input_fidelity")
    """OpenAI's fields without meaning for a diffusers pipeline; if sent, a header lists them."""

    def ignored(self) -> list[str]:
        """Fields that were sent but have no effect."""
        without = [name for name in self.WITHOUT_EFFECT if getattr(self, name, None) is not None]
        return [*(self.model_extra or {}), *without]

    def wants_b64(self) -> bool:
        return self.response_format == "b64_json"

    def release_pictures(self) -> None:
        """Release the pictures: a body lives until its request is answered."""
        for name in PICTURE_FIELDS:
            if value := getattr(self, name, None):
                setattr(self, name, [] if isinstance(value, list) else None)

    def sampling(self) -> Sampling:
        """The requested parameters. Raises InvalidRequest for an invalid size."""
        width, height = size_of(self.size)
        return Sampling(
            **{each.name: getattr(self, each.name) for each in FIELD_PARAMETERS}, width=width, height=height
        )

    def to_request(self, **more: Any) -> ImageRequest:
        """The request; `more` holds fields that override or extend those above."""
        fields = {
            "prompts": [""],
            "model": self.model,
            "n": self.n,
            "seed": self.seed,
            "sampling": self.sampling(),
            "keep_alive": self.keep_alive,
            "priority": self.priority,
            "loras": self.all_loras,
            "replace_loras": bool(self.replace_loras),
        }
        return ImageRequest(**fields | more)


class VariationsBody(Body):
    """Of `POST /v1/images/variations`."""

    image: Pictures = Field(min_length=1, max_length=1, description=f"The picture to vary. {PICTURE}")

    def to_request(self, **more: Any) -> ImageRequest:
        return super().to_request(images=self.image, **more)


class PaintBody(Body):
    """Common fields of generations and edits: format, quality, streaming."""

    quality: TextOrNumber = Field(
        None, description=f"One of {', '.join(QUALITIES)}: steps from the model's table. A number: that many steps."
    )
    background: Annotated[Literal["transparent", "opaque", "auto"] | None, BLANK] = Field(
        None, description="transparent only if the model draws an alpha channel."
    )
    output_format: Annotated[Literal["png", "webp", "jpeg"] | None, BLANK] = Field(None, description="Absent: png.")
    output_compression: Percent = Field(None, description="Quality of webp and jpeg; absent: 100, the best.")
    stream: Annotated[bool | None, BLANK] = Field(None, description="Answer with server-sent events.")
    partial_images: PartialImages = Field(None, description="Number of previews per picture in the stream.")
    controls: Controls = Field(
        [],
        max_length=MAX_PICTURES,
        description="Pictures that the model's ControlNets or adapters follow: `image`, `weight` (1 is as trained), "
        "`start` and `end` (0..1 of the steps), `mode` (kind, for nets with several); in a form, JSON. "
        "/v1/models has how many a model takes.",
    )
    prompt_weights: Annotated[bool | None, BLANK] = Field(
        None,
        description="Read AUTOMATIC1111's markup in both prompts: `(word:1.2)`, `[word]`, `BREAK`, and prompts longer "
        "than 77 tokens; for Stable Diffusion 1, 2 and XL. Absent: it is text, with a warning.",
    )
    safety_identifier: str | None = Field(None, description="Same as `user`.")
    detached: Annotated[bool | None, BLANK] = Field(
        None,
        description="Continue if the connection is closed; the request's progress has the pictures.",
    )

    def ignored(self) -> list[str]:
        pointless = {
            "output_compression": self.output_format in (None, "png"),
            "partial_images": not self.stream and bool(self.partial_images),
            "response_format": bool(self.stream) and self.response_format == "url",  # events contain base64
        }
        return super().ignored() + [name for name, yes in pointless.items() if yes and getattr(self, name) is not None]

    @property
    def _steps_as_quality(self) -> int | None:
        text = str(self.quality)
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None

    def sampling(self) -> Sampling:
        sampling = super().sampling()
        return replace(sampling, steps=self._steps_as_quality) if sampling.steps is None else sampling

    def to_request(self, **more: Any) -> ImageRequest:
        named = self.quality is not None and self._steps_as_quality is None
        return super().to_request(
            **{
                "quality": str(self.quality) if named else None,
                "transparent": self.background == "transparent",
                "previews": (self.partial_images or 0) if self.stream else 0,
                "detached": bool(self.detached),
                "weights": bool(self.prompt_weights),
                "controls": [control for body in self.controls for control in body.to_controls()],
            }
            | more
        )

    def wants_b64(self) -> bool:
        """The requested format; absent: a URL, except for gpt-image style requests, whose clients expect base64."""
        if self.response_format:
            return self.response_format == "b64_json"
        return (
            (self.model or "").startswith(GPT_MODELS)
            or any(getattr(self, name, None) is not None for name in GPT_FIELDS)
            or self.quality in GPT_QUALITIES
        )


class DrawBody(PaintBody):
    """Common fields of generations and chat: what comes besides the prompt."""

    moderation: str | None = Field(None, description="Without effect: the model's own safety checker decides.")
    style: str | None = Field(None, description="Without effect: describe it in the prompt.")
    image: Pictures = Field([], description=PICTURE)
    file: Pictures = Field([], description="Same as image.")
    files: Pictures = Field([], description="Same as image.")
    ref_images: Pictures = Field([], description="Same as image.")
    mask: Mask = Field(None, description="Transparent areas (or, without transparency, light ones) are redrawn.")

    @property
    def all_pictures(self) -> list[Picture]:
        return [*self.image, *self.file, *self.files, *self.ref_images]

    def to_request(self, **more: Any) -> ImageRequest:
        own = {"images": self.all_pictures, "mask": None if self.mask == "" else self.mask}
        return super().to_request(**own | more)


class GenerationsBody(DrawBody):
    """Of `POST /v1/images/generations`."""

    prompt: str | list[str] = Field(description=_PROMPT, examples=["a rocket on a blue background"])

    def to_request(self, **more: Any) -> ImageRequest:
        return super().to_request(prompts=[self.prompt] if isinstance(self.prompt, str) else self.prompt, **more)


class EditsBody(PaintBody):
    """Body of `POST /v1/images/edits`. In a form, `image` may be repeated, and may be called `image[]`."""

    prompt: str = Field(max_length=MAX_PROMPT, description=_PROMPT, examples=["a rocket on a green background"])
    image: Pictures = Field(
        min_length=1,
        validation_alias=AliasChoices("image", "images"),
        description=f"The picture to edit, or several if the model supports that. {PICTURE}",
    )
    ref_images: Pictures = Field([], description="More pictures, after those of image.")
    mask: Mask = Field(
        None,
        description="Same size as the first picture; transparent areas are redrawn. "
        "Absent: the fully transparent areas of the first picture, if it has some and the model takes a mask.",
    )
    masked_area_only: Annotated[bool | None, BLANK] = Field(
        None,
        description="Draw only the area around the mask, at `size` or the model's own, and paste it back.",
    )
    mask_padding: Annotated[Annotated[int, Field(ge=0, le=MAX_PADDING)] | None, NUMBER] = Field(
        None,
        description=f"With masked_area_only: context pixels around the mask; absent: {DEFAULT_PADDING}.",
    )
    input_fidelity: Annotated[Literal["high", "low"] | None, BLANK] = Field(
        None, description="Without effect: use `strength`."
    )

    def ignored(self) -> list[str]:
        alone = self.mask_padding is not None and not self.masked_area_only
        return super().ignored() + (["mask_padding"] if alone else [])

    def to_request(self, **more: Any) -> ImageRequest:
        padding = DEFAULT_PADDING if self.mask_padding is None else self.mask_padding
        return super().to_request(
            prompts=[self.prompt],
            images=[*self.image, *self.ref_images],
            mask=None if self.mask == "" else self.mask,
            mask_padding=padding if self.masked_area_only else None,
            mask_from_alpha=True,
            **more,
        )

    def wants_b64(self) -> bool:
        return self.response_format != "url"
