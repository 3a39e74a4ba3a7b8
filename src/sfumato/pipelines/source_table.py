"""What code decides by the source of diffusers' classes: a table that was made once, and readers for what is not in it.

A row counts while the class has the source that it had then. Of any other class the reader reads once; where it fails
(there is no source, or none that it understands) the careful answer is taken: such a pipeline keeps its own scheduler
and runs alone, such a VAE draws random numbers. `python -m benchmarks.sources` makes the table.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping
from importlib import resources
from types import MappingProxyType
from typing import Any, TypeVar

from sfumato.pipelines import source_digest

log = logging.getLogger(__name__)

FILE = "sources.json"

Fact = TypeVar("Fact")


class Unreadable(Exception):
    """A class's source is not there, or is not understood."""


@functools.cache
def table() -> Mapping[str, Mapping[str, Any]]:
    """Path of each class → digest of its source, and what was read in it."""
    return MappingProxyType(json.loads(resources.files("sfumato.pipelines").joinpath(FILE).read_text()))


def row(kind: type) -> Mapping[str, Any] | None:
    """What the table has of this class as it is installed."""
    known = table().get(source_digest.path(kind))
    return known if known and known["source"] == source_digest.class_digest(kind) else None


def read(kind: type, what: str, reader: Callable[[type], Fact]) -> Fact:
    """What `reader` reads in the source of `kind`. Raises Unreadable for whatever goes wrong in it."""
    try:
        return reader(kind)
    except Exception as error:  # of a source that nobody here has seen
        log.warning("%s of %s cannot be read from its source: %r", what, kind.__name__, error)
        raise Unreadable(f"{what} of {kind.__name__} cannot be read from its source ({error})") from error
