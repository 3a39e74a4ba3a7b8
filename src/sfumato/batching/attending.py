"""Attention that follows pictures besides the text (IP-Adapters), for some requests of a shared module.

The module itself never changes: a twin of it has attention processors of its own around the same layers. How strongly
each adapter acts is set before each forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Extended:
    """A twin whose attention follows pictures, for all requests with the same adapters."""

    def __init__(self, module: Any, processors: Sequence[Any], adapted: Any, kept: tuple[Any, ...]) -> None:
        """`processors`: those that follow pictures; each has one `scale` for each adapter. `adapted`: whose twin it
        is a twin of. `kept`: what stays in memory with it."""
        self.module = module
        self.adapted = adapted
        self.kept = kept
        self._processors = processors

    def activate(self, strengths: tuple[float, ...]) -> None:
        """From now on the adapters act so strongly."""
        for processor in self._processors:
            processor.scale = list(strengths)


class Attending:
    """What one request adds to the attention of a module."""

    def __init__(self, extended: Extended, strengths: tuple[float, ...]) -> None:
        self._extended = extended
        self.strengths = strengths
        """How strongly each adapter acts in the request's next forward pass; 0: not at all."""

    @property
    def module(self) -> Any:
        return self._extended.module

    def activate(self) -> None:
        self._extended.activate(self.strengths)
