"""Counters of several workers as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from sfumato.status import EngineStats


def total(of: Iterable[EngineStats]) -> EngineStats:
    """The sum of each field, of a mapping that of each key."""
    several = list(of)
    values: dict[str, Any] = {}
    for spec in fields(EngineStats):
        numbers = [getattr(stats, spec.name) for stats in several]
        if any(isinstance(number, Mapping) for number in numbers):
            values[spec.name] = dict(sum((Counter(number) for number in numbers), Counter[Any]()))
        else:
            values[spec.name] = sum(numbers)
    return EngineStats(**values)
