"""Concatenations that are kept: the same text embeddings come again with every step of the same requests."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SMALL = 256 << 10
"""Bytes. Less than this is joined anew faster than it is looked up and checked."""


@dataclass(slots=True)
class _Held:
    sources: list[weakref.ref[torch.Tensor]]
    versions: list[int]
    joined: torch.Tensor | None = None
    version: int = 0

    def is_of(self, values: Sequence[torch.Tensor]) -> bool:
        """Whether these very tensors were joined, and neither they nor the result was written to since."""
        return (
            all(source() is value for source, value in zip(self.sources, values, strict=True))
            and self.versions == [value._version for value in values]
            and (self.joined is None or self.joined._version == self.version)
        )


class Joins:
    """`torch.cat` that remembers: what comes a second time is kept for the third."""

    def __init__(self, limit: int = 256 << 20) -> None:
        self._limit = limit
        self._held: OrderedDict[tuple[int, ...], _Held] = OrderedDict()

    def cat(self, values: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        size = sum(value.nbytes for value in values)
        if size < SMALL or size > self._limit or any(value.is_inference() for value in values):
            return torch.cat(list(values), dim)
        key = (dim, *(id(value) for value in values))
        held = self._held.pop(key, None)
        if held is None or not held.is_of(values):
            # Latents come once; only what comes again is worth its memory.
            self._held[key] = self._noted(key, values)
            self._trim()
            return torch.cat(list(values), dim)
        if held.joined is None:
            held.joined = torch.cat(list(values), dim)
            held.version = held.joined._version
        self._held[key] = held
        self._trim()
        return held.joined

    def spare(self) -> int:
        """Drop everything, keep half as much from now on, and return its bytes: memory is short."""
        freed = self._bytes()
        self.clear()
        self._limit //= 2 if freed else 1
        return freed

    def clear(self) -> None:
        self._held.clear()

    def _noted(self, key: tuple[int, ...], values: Sequence[torch.Tensor]) -> _Held:
        # With the first of the tensors that dies goes what was made of it.
        sources = [weakref.ref(value, lambda _: self._held.pop(key, None)) for value in values]
        return _Held(sources, [value._version for value in values])

    def _trim(self) -> None:
        while len(self._held) > 64 or self._bytes() > self._limit:
            self._held.popitem(last=False)

    def _bytes(self) -> int:
        return sum(held.joined.nbytes for held in self._held.values() if held.joined is not None)
