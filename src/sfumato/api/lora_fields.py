"""How requests name LoRAs, in all the spellings that clients send."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import from_json

from sfumato.api.fields import BLANK, number_within
from sfumato.loras import MAX_LORAS, MAX_NAME, MAX_WEIGHT, Lora

NAMES = ("path", "id", "lora_name", "name")
"""Keys of an entry that say which LoRA; of several the first counts."""

WEIGHTS = ("weight", "scale", "multiplier", "strength")

OTHERS = ("text_weight", "weight_name", "int_id", "is_high_noise")
"""More keys that are read: `weight_name` is a file of the hub's repository; the last two are clients' own."""


def _entries(value: Any) -> list[Any]:
    """One or several, each a name or an object; in a form, JSON or a name."""
    if isinstance(value, str):
        text = value.strip()
        if not text:
            return []
        if text[0] in "[{":
            try:
                value = from_json(text, allow_inf_nan=False)
            except ValueError:
                raise ValueError('must be JSON, [{"name": "...", "weight": 1.0}], or a name') from None
        else:
            value = text
    values = value if isinstance(value, list) else [] if value is None else [value]
    if len(values) > MAX_LORAS:
        raise ValueError(f"there are {len(values)}; at most {MAX_LORAS} act on a picture")
    return [_entry(each) for each in values if each != ""]


def _entry(value: Any) -> Lora:
    if isinstance(value, Lora):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        raise ValueError('each must be a name or an object, {"name": "...", "weight": 1.0}')
    known = (*NAMES, *WEIGHTS, *OTHERS)
    if unknown := sorted(str(key)[:100] for key in value.keys() - set(known)):
        raise ValueError(f"{', '.join(unknown)[:200]} is not known; {', '.join(known)} are valid")
    source = next((value[key] for key in NAMES if value.get(key) not in (None, "")), None)
    if not isinstance(source, str) or len(source) > MAX_NAME:
        raise ValueError(
            f"each must name its LoRA, in one of {', '.join(NAMES)}: a text of up to {MAX_NAME} characters"
        )
    if file := value.get("weight_name"):
        source = f"{source}/{file}"
    weights = [_number(key, value[key]) for key in WEIGHTS if value.get(key) is not None]
    text = value.get("text_weight")
    return Lora(source, weights[0] if weights else 1.0, None if text is None else _number("text_weight", text))


def _number(key: str, value: Any) -> float:
    try:
        return number_within(value, -MAX_WEIGHT, MAX_WEIGHT)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


_SHAPE: TypeAlias = str | dict[str, Any] | list[str | dict[str, Any]] | None
Loras: TypeAlias = Annotated[list[Any], BeforeValidator(_entries, json_schema_input_type=_SHAPE)]


class LoraFields(BaseModel):
    """Fields of all bodies that draw."""

    loras: Loras = Field(
        [],
        max_length=MAX_LORAS,
        description="LoRAs, one or a list: a name from /v1/loras, or an object with `name` (or `path`, `id`, "
        "`lora_name`: a name, a path below loras/, a hub id with a file, or a URL that the server allows), `weight` "
        "(or `scale`, `multiplier`, `strength`; 1 is as trained) and `text_weight` (for the text encoders; absent: as "
        "weight). Also `<lora:name:0.8>` in a prompt.",
        examples=[[{"name": "watercolour", "weight": 0.8}]],
    )
    image_loras: Loras = Field([], max_length=MAX_LORAS, description="Same as loras.")
    lora: Loras = Field([], max_length=MAX_LORAS, description="Same as loras.")
    replace_loras: Annotated[bool | None, BLANK] = Field(
        None, description="true: the LoRAs of the model file do not act. Absent: those of the request are added."
    )

    @property
    def all_loras(self) -> list[Lora]:
        return [*self.loras, *self.image_loras, *self.lora]
