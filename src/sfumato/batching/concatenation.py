"""Join many calls into one: how each kind of leaf is joined, and a cache of concatenations.

The same text embeddings recur at every step of the same requests, so concatenated tensors are kept for a while.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sfumato.batching import text_masks
from sfumato.batching.calls import Call, Leaf

SMALL = 256 << 10
"""In bytes. Smaller tensors are concatenated faster than they are looked up and checked."""


@dataclass(slots=True)
class _Entry:
    sources: list[weakref.ref[torch.Tensor]]
    versions: list[int]
    concatenated: torch.Tensor | None = None
    version: int = 0

    def is_of(self, values: Sequence[torch.Tensor]) -> bool:
        """Whether exactly these tensors were joined, and neither they nor the result were modified since."""
        return (
            all(source() is value for source, value in zip(self.sources, values, strict=True))
            and self.versions == [value._version for value in values]
            and (self.concatenated is None or self.concatenated._version == self.version)
        )


class ConcatenationCache:
    """`torch.cat` with a cache: a result is kept from its second use on."""

    def __init__(self, limit: int = 256 << 20) -> None:
        self._limit = limit
        self._entries: OrderedDict[tuple[int, ...], _Entry] = OrderedDict()

    def cat(self, values: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        size = sum(value.nbytes for value in values)
        if size < SMALL or size > self._limit or any(value.is_inference() for value in values):
            return torch.cat(list(values), dim)
        key = (dim, *(id(value) for value in values))
        entry = self._entries.pop(key, None)
        if entry is None or not entry.is_of(values):
            # Latents occur once; only repeated tensors are worth the memory.
            self._entries[key] = self._new_entry(key, values)
            self._trim()
            return torch.cat(list(values), dim)
        if entry.concatenated is None:
            entry.concatenated = torch.cat(list(values), dim)
            entry.version = entry.concatenated._version
        self._entries[key] = entry
        self._trim()
        return entry.concatenated

    def shrink(self) -> int:
        """Memory is short: drop everything, halve the limit, and return the bytes freed."""
        freed = self._bytes()
        self.clear()
        self._limit //= 2 if freed else 1
        return freed

    def clear(self) -> None:
        self._entries.clear()

    def _new_entry(self, key: tuple[int, ...], values: Sequence[torch.Tensor]) -> _Entry:
        # The entry is dropped with the first of its tensors that dies.
        sources = [weakref.ref(value, lambda _: self._entries.pop(key, None)) for value in values]
        return _Entry(sources, [value._version for value in values])

    def _trim(self) -> None:
        while len(self._entries) > 64 or self._bytes() > self._limit:
            self._entries.popitem(last=False)

    def _bytes(self) -> int:
        return sum(entry.concatenated.nbytes for entry in self._entries.values() if entry.concatenated is not None)


def join(calls: Sequence[Call], cache: ConcatenationCache) -> dict[str, Any]:
    """The keyword arguments of one forward pass for all of `calls`, whose keys are equal."""
    concatenated: list[Any] = []
    for at, leaf in enumerate(calls[0].leaves):
        concatenated.append(_JOIN[leaf.kind]([call.leaves[at] for call in calls], calls, cache))
    arguments: dict[str, Any] = unflatten(calls[0].shape, iter(concatenated))
    for text, mask in calls[0].pairs.items():
        arguments[mask] = _mask(text, mask, calls)
    return arguments


def _cat(leaves: list[Leaf], calls: Sequence[Call], cache: ConcatenationCache) -> torch.Tensor:
    return cache.cat([leaf.value for leaf in leaves])


def _cat_second(leaves: list[Leaf], calls: Sequence[Call], cache: ConcatenationCache) -> torch.Tensor:
    return cache.cat([leaf.value for leaf in leaves], dim=1)


def _cat_time(leaves: list[Leaf], calls: Sequence[Call], cache: ConcatenationCache) -> torch.Tensor:
    # Some schedulers use int64, some float32; time embeddings compute in float32 anyway.
    values = [leaf.value for leaf in leaves]
    if len({value.dtype for value in values}) > 1:
        values = [value.float() for value in values]
    return torch.cat(values)


def _cat_ragged(leaves: list[Leaf], calls: Sequence[Call], cache: ConcatenationCache) -> torch.Tensor:
    longest = max(leaf.value.shape[1] for leaf in leaves)
    if all(leaf.value.shape[1] == longest for leaf in leaves):
        return _cat(leaves, calls, cache)
    return torch.cat([text_masks.padded(leaf.value, longest) for leaf in leaves])


def _cat_lists(leaves: list[Leaf], calls: Sequence[Call], cache: ConcatenationCache) -> list[Any]:
    return [item for leaf in leaves for item in leaf.value]


def _first(leaves: list[Leaf], calls: Sequence[Call], cache: ConcatenationCache) -> Any:
    return leaves[0].value


def _repeat(leaves: list[Leaf], calls: Sequence[Call], cache: ConcatenationCache) -> list[Any]:
    return [leaves[0].value[0]] * sum(call.rows for call in calls)


_JOIN: Mapping[str, Callable[[list[Leaf], Sequence[Call], ConcatenationCache], Any]] = {
    "rows": _cat,
    "multi": _cat,
    "second": _cat_second,
    "time": _cat_time,
    "ragged": _cat_ragged,
    "list": _cat_lists,
    "each": _repeat,
    "equal": _first,
    "value": _first,
    "adapters": _first,  # not an argument, and behind all that are
    "mask": _first,  # filled in by `_mask`, which knows the text it belongs to
}


def _mask(text: str, mask: str, calls: Sequence[Call]) -> torch.Tensor | None:
    return text_masks.joined([_at(call, text) for call in calls], [_at(call, mask) for call in calls])


def _at(call: Call, path: str) -> Any:
    return next(leaf.value for leaf in call.leaves if leaf.path == path)


def unflatten(shape: Any, leaves: Iterator[Any]) -> Any:
    """The arguments of a call from `Call.shape` and a value for each leaf, in order."""
    if shape == "leaf":
        return next(leaves)
    kind, keys, inner = shape
    values = [unflatten(item, leaves) for item in inner]
    return dict(zip(keys, values, strict=True)) if kind == "dict" else (list if kind == "list" else tuple)(values)
