"""Fields of request bodies: types that both dialects share, and the fields of `sfumato.sampling`'s parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, TypeAlias

from pydantic import AliasChoices, BeforeValidator, Field, WithJsonSchema

from sfumato.core import BATCH, INTERACTIVE, MAX_SEED, PRIORITIES, keep_alive_seconds
from sfumato.errors import in_words
from sfumato.sampling import Parameter
from sfumato.serving.planning import RANDOM_SEED

MAX_COUNT = 1000
"""Well above any server's own limit, the setting max_n."""

MAX_SIDE = 100_000
"""Well above any server's own limit, the setting max_side."""


SERVICE_TIERS: Mapping[str, str] = MappingProxyType(
    {"flex": BATCH, **dict.fromkeys(("auto", "default", "scale", "priority"), INTERACTIVE)}
)
"""OpenAI's `service_tier` → a name of `PRIORITIES`. No tier is above the default."""


_PLAIN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def _blank_is_absent(value: Any) -> Any:
    """Forms send an empty string for an empty field."""
    return None if isinstance(value, str) and not value.strip() else value


def plain_number(value: Any) -> Any:
    """A text must be a number as JSON has them; others as they are. Python also reads 1_000, and digits of all scripts,
    and takes true for 1.

    Raises ValueError.
    """
    if isinstance(value, bool) or (isinstance(value, str) and not _PLAIN.fullmatch(value.strip())):
        raise ValueError("a number in plain digits is valid, such as 20 or 0.5")
    return value


def _no_switch(value: Any) -> Any:
    """Raises ValueError for true and false, which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a text or a number is valid")
    return value


def number_within(value: Any, least: float, most: float) -> float:
    """A number, or a text that is one. Raises ValueError that says the value and the bounds."""
    try:
        number = float(plain_number(str(value)))
    except (ValueError, OverflowError):
        number = math.nan
    if not least <= number <= most:
        kind = " is no number" if math.isnan(number) else ""
        raise ValueError(f"{in_words(value)}{kind}; {least:g} to {most:g} are valid")
    return number


def _priority(value: Any) -> Any:
    """A name of `PRIORITIES`, or a tier of OpenAI's. Raises ValueError for others."""
    name = value.strip().lower() if isinstance(value, str) else value
    if name in (None, ""):
        return INTERACTIVE
    if not isinstance(name, str) or name not in {*PRIORITIES, *SERVICE_TIERS}:
        tiers = ", ".join(SERVICE_TIERS)
        valid = " and ".join(PRIORITIES)
        raise ValueError(f"{valid} are valid, and OpenAI's tiers {tiers}; {BATCH} waits for all others")
    return SERVICE_TIERS.get(name, name)


BLANK = BeforeValidator(_blank_is_absent)
PLAIN = BeforeValidator(plain_number)
"""Of a number in a form, a query or a header."""
NUMBER = BeforeValidator(lambda value: plain_number(_blank_is_absent(value)))
"""The same where it may be empty."""
Text: TypeAlias = Annotated[str | None, BLANK]
TextOrNumber: TypeAlias = Annotated[str | int | None, BeforeValidator(_no_switch), BLANK]
Seed: TypeAlias = Annotated[Annotated[int, Field(ge=RANDOM_SEED, le=MAX_SEED)] | None, NUMBER]
KeepAlive: TypeAlias = Annotated[
    float | None,
    BeforeValidator(lambda value: None if value is None else keep_alive_seconds(value)),
    BLANK,
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}, {"type": "null"}]}),
]
Priority: TypeAlias = Annotated[
    str,
    BeforeValidator(_priority),
    WithJsonSchema({"anyOf": [{"enum": [*PRIORITIES], "type": "string"}, {"type": "null"}]}),
    Field(
        validation_alias=AliasChoices("priority", "service_tier"),
        description=f"`{BATCH}`: for pictures that nobody waits for; they are drawn when no others are, and a little "
        f"beside them. `{INTERACTIVE}` or absent: as all others. Also OpenAI's `service_tier`: `flex` is `{BATCH}`.",
    ),
]
PictureCount: TypeAlias = Annotated[Annotated[int, Field(ge=1, le=MAX_COUNT)] | None, NUMBER]
Side: TypeAlias = Annotated[Annotated[int, Field(ge=1, le=MAX_SIDE)] | None, NUMBER]


def openai_field(parameter: Parameter) -> tuple[Any, Any]:
    """Type and description of a parameter in OpenAI's request bodies."""
    kind = str | None if parameter.empty else _kind(parameter)
    names = (parameter.name, *parameter.aliases)
    also = f"; also {' and '.join(f'`{alias}`' for alias in parameter.aliases)}" if parameter.aliases else ""
    examples = [parameter.example] if parameter.kind is str and parameter.example else None
    alias = AliasChoices(*names) if parameter.aliases else None
    return kind, Field(None, validation_alias=alias, description=f"{parameter.help}{also}.", examples=examples)


def a1111_field(parameter: Parameter) -> tuple[Any, Any]:
    """The same in AUTOMATIC1111's request bodies."""
    one_based = " Here as in AUTOMATIC1111: 1 is the last layer, 2 the last but one." if parameter.one_based else ""
    neutral = f"; {', '.join(map(str, parameter.neutral))} asks for nothing, as there" if parameter.neutral else ""
    examples = [parameter.example] if parameter.example is not None else None
    return _kind(parameter), Field(None, description=f"{parameter.help}{neutral}.{one_based}", examples=examples)


def _kind(parameter: Parameter) -> Any:
    if parameter.kind is str:
        return Text
    maximum = parameter.most if parameter.most is None or not parameter.one_based else parameter.most + 1
    return Annotated[Annotated[parameter.kind, Field(ge=parameter.least, le=maximum)] | None, NUMBER]
