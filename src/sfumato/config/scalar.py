"""Parse a word of a model file as YAML does: values of `options`, and of keys written in quotes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

Scalar: TypeAlias = str | int | float | bool | None

_INTEGER = re.compile(r"[-+]?[0-9]{1,400}")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?")
_WORDS: Mapping[str, Scalar] = {"true": True, "false": False, "null": None, "none": None, "~": None}


def scalar(text: str) -> Scalar:
    """Integer, float, true, false, null, or the text itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text
