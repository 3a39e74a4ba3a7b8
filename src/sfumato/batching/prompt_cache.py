"""Prompt-embedding cache: the same text through the same encoder gives the same numbers."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch

from sfumato.batching import outputs
from sfumato.batching.calls import Call, Fingerprints

TOKENS = "input_ids"
"""The argument that identifies a text encoder: integers, one row of tokens per text."""

READ = frozenset({TOKENS, "attention_mask", "position_ids", "token_type_ids"})
"""The tensors that a pure text encoder reads."""


class PromptCache:
    """The latest outputs of text encoders, up to a number of bytes. Stores and returns copies."""

    def __init__(self, limit: int = 256 << 20) -> None:
        self._limit = limit
        self._entries: OrderedDict[Hashable, tuple[weakref.ref[Any], int, Any, str]] = OrderedDict()
        self._bytes = 0
        self.hits = 0
        """Calls answered from here."""
        self.misses = 0
        """Calls whose result was computed, and could have been here."""

    @property
    def size(self) -> int:
        """Bytes in use."""
        return self._bytes

    def key(self, call: Call, fingerprints: Fingerprints) -> Hashable:
        """Key that determines the output of this call; None unless it depends only on tokens."""
        if call.key is None or call.module.training:
            return None
        parts: list[Any] = [id(call.module), call.method, call.shape, call.runner.number if call.runner else 0]
        has_tokens = False
        for leaf in call.leaves:
            if not isinstance(leaf.value, torch.Tensor):
                parts.append((leaf.key, leaf.exact))
            elif leaf.path in READ and not leaf.value.is_floating_point():
                has_tokens |= leaf.path == TOKENS
                parts.append((leaf.path, leaf.value.shape, leaf.value.dtype, fingerprints.of(leaf.value)))
            else:
                return None
        return tuple(parts) if has_tokens else None

    def get(self, key: Hashable) -> tuple[Any, str] | None:
        """A copy of the output and the name of what computed it, or None."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry[0]() is None:  # the module is gone, and another may have reused its id
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        self.hits += 1
        return outputs.copied(entry[2]), entry[3]

    def put(self, key: Hashable, module: Any, output: Any, by: str = "") -> None:
        """Keep a copy of what was computed, unless it would take more than a quarter of the space."""
        self.misses += 1
        try:
            size = sum(tensor.nbytes for tensor in outputs.tensors(output))
            if size > self._limit // 4:
                return
            value = outputs.copied(output)
        except outputs.Unsplittable:
            return
        self._drop(key)
        self._entries[key] = (weakref.ref(module), size, value, by)
        self._bytes += size
        while self._bytes > self._limit:
            self._drop(next(iter(self._entries)))

    def shrink(self) -> int:
        """Memory is short: forget everything, halve the limit, and return the bytes freed."""
        freed = self._bytes
        self.clear()
        self._limit //= 2 if freed else 1
        return freed

    def clear(self) -> None:
        """Forget everything: call it when weights or adapters change."""
        self._entries.clear()
        self._bytes = 0

    def _drop(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        if entry:
            self._bytes -= entry[1]
