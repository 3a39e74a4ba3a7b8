"""The file of a result, in the format of its request, with the recipe inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from sfumato.core import Recipe
from sfumato.pictures import clips, recipe, sounds
from sfumato.pictures.results import Result

Encode = Callable[[Any, Recipe], bytes]

ENCODERS: Mapping[str, Encode] = MappingProxyType({"png": recipe.encode, **clips.ENCODERS, **sounds.ENCODERS})
"""A name of `formats.FORMATS` -> what makes a result of its kind that file."""


def encode(result: Result, made: Recipe, format: str) -> bytes:
    """The file. Needs no torch. Raises ImportError without the package that `formats.check_installed` asks for."""
    return ENCODERS[format](result, made)
