"""Attention that follows pictures besides the text (IP-Adapters), for some requests of a shared module.

The module itself never changes: a twin of it has attention processors of its own around the same layers. How strongly
each adapter acts is set before each forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

RESTING = 1.0
"""Between forward passes: some pipelines ask whether an adapter acts, of a twin that other requests have, too."""


class Extended:
    """A twin whose attention follows pictures, for all requests with the same adapters."""

    def __init__(self, module: Any, processors: Sequence[Any], adapted: Any, kept: tuple[Any, ...]) -> None:
        """`processors`: those that follow pictures; each has one `scale` for each adapter, or a number for the only
        one. `adapted`: whose twin it is a twin of. `kept`: what stays in memory with it."""
        self.module = module
        self.adapted = adapted
        self.kept = kept
        self._processors = processors

    @contextmanager
    def acting(self, strengths: tuple[float, ...]) -> Iterator[None]:
        """Within it the adapters act so strongly."""
        self._put(strengths)
        try:
            yield
        finally:
            self._put((RESTING,) * len(strengths))

    def _put(self, strengths: tuple[float, ...]) -> None:
        for processor in self._processors:
            processor.scale = list(strengths) if isinstance(processor.scale, list) else strengths[0]


class Attending:
    """What one request adds to the attention of a module."""

    def __init__(self, extended: Extended, strengths: tuple[float, ...]) -> None:
        self._extended = extended
        self.strengths = strengths
        """How strongly each adapter acts in the request's next forward pass; 0: not at all."""

    @property
    def module(self) -> Any:
        return self._extended.module

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Within it the request's adapters act as strongly as they are to."""
        with self._extended.acting(self.strengths):
            yield
