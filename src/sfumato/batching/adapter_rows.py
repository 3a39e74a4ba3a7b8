"""Different adapters on the rows of one batch: peft's `adapter_names`, without its copies of the rows.

peft picks the rows of an adapter by lists of indices, once to read them and twice to write them, in every layer. Here
calls with the same adapter lie together (`together`), so that their rows are one slice, which is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from peft.tuners.lora import layer as peft_layers

BASE = "__base__"
"""peft's name for rows without an adapter."""

ADDITIVE = (peft_layers.Linear, peft_layers.Conv1d, peft_layers.Conv2d, peft_layers.Conv3d)
"""Layers where an adapter adds B(A(x)), scaled, to the output of the layer below. Others are left to peft."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Rows:
    """The adapter of each row."""

    names: tuple[str, ...]
    slices: tuple[tuple[str, int, int], ...]
    """Adapter, first row and the one after the last, but for rows without an adapter."""

    @classmethod
    def of(cls, names: Iterable[str]) -> Rows:
        names, slices, start = tuple(names), [], 0
        for name, group in groupby(names):
            stop = start + len(list(group))
            if name != BASE:
                slices.append((name, start, stop))
            start = stop
        return cls(names, tuple(slices))

    def per_row(self, given: torch.Tensor) -> int:
        """Entries that a layer gets for each row, such as the frames of a video. Raises ValueError if that varies."""
        repeats, rest = divmod(len(given), len(self.names))
        if rest or not repeats:
            raise ValueError(f"a layer with an adapter gets {len(given)} rows for the {len(self.names)} of the batch")
        return repeats

    def repeated(self, repeats: int) -> list[str]:
        return [name for name in self.names for _ in range(repeats)]

    def add(self, layer: Any, given: torch.Tensor, output: torch.Tensor) -> None:
        """Change `output`, which the layer below computed from `given`, to what the adapters make of it."""
        repeats = self.per_row(given)
        for name, start, stop in self.slices:
            if name not in layer.lora_A:
                continue
            part = slice(start * repeats, stop * repeats)
            down, up = layer.lora_A[name], layer.lora_B[name]
            more = up(down(layer.lora_dropout[name](given[part].to(down.weight.dtype))))
            output[part].add_(more.to(output.dtype), alpha=layer.scaling[name])


def together(items: Sequence[_T], adapters: Callable[[_T], object]) -> list[_T]:
    """The same items, those with equal adapters one after another; the first stays first."""
    order: dict[object, int] = {}
    return sorted(items, key=lambda item: order.setdefault(adapters(item), len(order)))
