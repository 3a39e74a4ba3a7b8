"""Facts read from the source of diffusers' classes: a shipped table, and readers for classes that it does not cover.

A row is valid as long as the source of its class is unchanged. A reader reads any other class once. If it fails (no
source, or code that it does not understand), the safe answer applies: the pipeline keeps its own scheduler and runs
alone; the VAE draws random numbers. `python -m benchmarks.sources` creates the table.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping
from importlib import resources
from types import MappingProxyType
from typing import Any, TypeVar

log = logging.getLogger(__name__)

FILE = "sources.json"

Fact = TypeVar("Fact")


class Unreadable(Exception):
    """The source of a class is missing or was not understood."""


@functools.cache
def table() -> Mapping[str, Mapping[str, Any]]:
    """Path of each class → digest of its source, and the facts read from it."""
    return MappingProxyType(json.loads(resources.files("sfumato.pipelines").joinpath(FILE).read_text()))


def row(kind: type) -> Mapping[str, Any] | None:
    """The table's row for this class; None if it has none or the installed source differs."""
    from sfumato.pipelines import source_digest  # imports torch, and the table is read without it, too

    entry = table().get(source_digest.path(kind))
    return entry if entry and entry["source"] == source_digest.class_digest(kind) else None


def read(kind: type, what: str, reader: Callable[[type], Fact]) -> Fact:
    """What `reader` reads in the source of `kind`. Raises Unreadable for any error."""
    try:
        return reader(kind)
    except Exception as error:  # an unknown source may raise anything
        log.warning("%s of %s cannot be read from its source: %r", what, kind.__name__, error)
        raise Unreadable(f"{what} of {kind.__name__} cannot be read from its source ({error})") from error
