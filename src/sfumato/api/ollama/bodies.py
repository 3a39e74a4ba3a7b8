"""Request bodies of Ollama's routes: the fields of `/v1/images/generations`, some under Ollama's names."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from sfumato.api.fields import BLANK, Side
from sfumato.api.openai.bodies import GenerationsBody
from sfumato.api.openai.pictures import Pictures
from sfumato.sampling import MAX_PROMPT, Sampling
from sfumato.serving.planning import MAX_PICTURES, ImageRequest

MAX_NAME = 1000
"""Characters of a model's name."""

BLANKS: tuple[object, ...] = (None, "", [], {}, False)
"""What clients send for a field of text models that they do not use."""


def _zero_is_absent(value: Any) -> Any:
    """Clients in Go send 0 for a number that was not set."""
    return None if value == 0 and not isinstance(value, bool) else value


Length = Annotated[Side, BeforeValidator(_zero_is_absent)]


class GenerateBody(GenerationsBody):
    """Of `POST /api/generate`. What `options` has of the fields counts as if it stood beside it."""

    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = (*GenerationsBody.WITHOUT_EFFECT, "n", "response_format")

    prompt: str | None = Field(  # type: ignore[assignment]
        None,
        max_length=MAX_PROMPT,
        description="What to draw. Absent or empty: the model is loaded, or with `keep_alive: 0` unloaded.",
        examples=["a rocket on a blue background"],
    )
    image: Pictures = Field(
        [],
        max_length=MAX_PICTURES,
        validation_alias=AliasChoices("image", "images"),
        description="Pictures to draw from: base64, data: URI or http(s) URL.",
    )
    width: Length = Field(
        None, description="Pixels; absent or 0: as height, and without both the model's size.", examples=[128]
    )
    height: Length = Field(None, description="Pixels; absent or 0: as width.", examples=[128])
    stream: Annotated[bool | None, BLANK] = Field(
        None, description="false: one JSON object. Otherwise a line for each step, and one with the picture."
    )
    options: dict[str, Any] | None = Field(
        None, description="Any of these fields, such as `seed`, `steps`, `width`, `height`, `negative_prompt`."
    )

    @model_validator(mode="before")
    @classmethod
    def _with_options(cls, data: Any) -> Any:
        """The fields in `options` beside the others; in `options` remain those that no picture has."""
        if not isinstance(data, dict):
            return data
        options = data.get("options")
        if not isinstance(options, dict):
            return {name: _zero_steps(name, value) for name, value in data.items()}
        names = _names(cls) - {"options"}
        fields = {name: value for name, value in options.items() if name in names and value is not None}
        top = {name: value for name, value in data.items() if value not in (None, "")}
        others = {name: value for name, value in options.items() if name not in names}
        return {name: _zero_steps(name, value) for name, value in (fields | top | {"options": others}).items()}

    def ignored(self) -> list[str]:
        extra = self.model_extra or {}
        unused = [name for name, value in extra.items() if value in BLANKS]
        others = [f"options.{name}" for name in self.options or ()]
        return [name for name in super().ignored() if name not in unused] + others

    def wants_b64(self) -> bool:
        return True

    def sampling(self) -> Sampling:
        width, height = self.width or self.height, self.height or self.width
        sampling = super().sampling()
        return replace(sampling, width=width, height=height) if width and height else sampling

    def to_request(self, **more: Any) -> ImageRequest:
        return super().to_request(**{"n": 1, "split_prompt": False} | more)


class ShowBody(BaseModel):
    """Of `POST /api/show`."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str = Field(
        min_length=1,
        max_length=MAX_NAME,
        validation_alias=AliasChoices("model", "name"),
        description="A name from /api/tags.",
    )


def _zero_steps(name: str, value: Any) -> Any:
    return _zero_is_absent(value) if name == "steps" else value


def _names(kind: type[BaseModel]) -> set[str]:
    """All names under which its fields may be sent."""
    names = set(kind.model_fields)
    for info in kind.model_fields.values():
        if isinstance(info.validation_alias, AliasChoices):
            names |= {alias for alias in info.validation_alias.choices if isinstance(alias, str)}
    return names
