"""Module outputs: split by rows, copied, and compared.

A forward pass over several requests returns one output; each request gets its rows of every tensor in it.
Parts that cannot be split are never dropped: `Unsplittable` is raised and the calls run alone.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)

DISTRIBUTIONS = frozenset({
    "DiagonalGaussianDistribution", "OobleckDiagonalGaussianDistribution", "IdentityDistribution",
    "MiniMaxH3AudioDiagonalGaussianDistribution",
})  # fmt: skip
"""Return types of a VAE's `encode`, fully determined by one tensor, `parameters`."""

DYNAMIC_LAYERS = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer"})
"""Key-value cache layers whose tensors have the rows first and are replaced, not modified."""

OnTensor: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
OnList: TypeAlias = Callable[[list[Any]], list[Any] | None]


class Unsplittable(Exception):
    """An output has a part that belongs to all rows at once, or of an unknown type."""


def split(output: Any, rows: Sequence[int], *, listed: bool = False) -> list[Any]:
    """Split the `output` of a forward pass over `sum(rows)` rows into one output per member.

    A tensor's first dimension must be a multiple of the rows: video models return rows × frames.
    `listed`: the module takes and returns a list with one tensor per row. The parts are copies, as a
    tensor view of one row would keep the whole batch in memory.
    """
    total = sum(rows)
    parts = []
    start = 0
    for count in rows:
        parts.append(_mapped(output, _narrow(start, count, total), _sliced(start, count, total) if listed else None))
        start += count
    return parts


def copied(output: Any) -> Any:
    """`output` with every tensor cloned."""
    return _mapped(output, torch.Tensor.clone)


def repeated(output: Any, times: int) -> Any:
    """`output` with the rows of every tensor so many times."""
    return _mapped(output, lambda tensor: torch.cat([tensor] * times))


def tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor in `output`, in order."""
    collected: list[torch.Tensor] = []

    def collect(tensor: torch.Tensor) -> torch.Tensor:
        collected.append(tensor)
        return tensor

    _mapped(output, collect)
    return collected


def difference(part: Any, alone: Any) -> float:
    """Largest error of `part` relative to the largest value of each tensor of `alone`; inf if the shapes differ."""
    batched, single = tensors(part), tensors(alone)
    if len(batched) != len(single) or type(part) is not type(alone):
        return float("inf")
    return max((_error(a, b) for a, b in zip(batched, single, strict=True)), default=0.0)


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not b.numel():
        return 0.0
    if not (b.is_floating_point() or b.is_complex()):
        return 0.0 if torch.equal(a, b) else float("inf")
    wide = torch.complex128 if b.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    # NaN in the same places counts as equal.
    a, b = torch.where(a.isnan() & b.isnan(), 0, a), torch.where(a.isnan() & b.isnan(), 0, b)
    error = (a - b).abs().max().item() / max(b.abs().max().item(), 1e-12)
    return float("inf") if error != error else float(error)


def _narrow(start: int, count: int, total: int) -> OnTensor:
    def narrow(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or tensor.shape[0] % total or not tensor.shape[0]:
            raise Unsplittable(f"an output of shape {tuple(tensor.shape)} cannot be split into {total} rows")
        per_row = tensor.shape[0] // total
        return tensor.narrow(0, start * per_row, count * per_row).clone()

    return narrow


def _sliced(start: int, count: int, total: int) -> OnList:
    def sliced(items: list[Any]) -> list[Any] | None:
        if len(items) != total or not all(isinstance(item, torch.Tensor) for item in items):
            return None
        return [item.clone() for item in items[start : start + count]]

    return sliced


def _mapped(value: Any, on_tensor: OnTensor, on_list: OnList | None = None) -> Any:
    """A copy of `value` with every tensor replaced; raises Unsplittable for an unknown type."""
    if isinstance(value, torch.Tensor):
        return on_tensor(value)
    if isinstance(value, PLAIN):
        return value
    if type(value) is list and on_list is not None and (rows := on_list(value)) is not None:
        return rows
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, on_tensor, on_list) for item in value)
    if isinstance(value, Mapping):
        parts = {key: _mapped(item, on_tensor, on_list) for key, item in value.items()}
        return parts if type(value) is dict else type(value)(**parts)
    if type(value).__name__ in DISTRIBUTIONS:
        attributes = {"deterministic": value.deterministic} if hasattr(value, "deterministic") else {}
        return type(value)(_mapped(value.parameters, on_tensor), **attributes)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return type(value)(**{name: _mapped(item, on_tensor, on_list) for name, item in fields.items()})
    if hasattr(value, "layers") and all(type(layer).__name__ in DYNAMIC_LAYERS for layer in value.layers):
        return _mapped_cache(value, on_tensor)
    raise Unsplittable(f"an output contains a {type(value).__name__}")


def _mapped_cache(cache: Any, on_tensor: OnTensor) -> Any:
    # transformers' DynamicCache: text encoders return one that is rarely used.
    mapped = copy.copy(cache)
    mapped.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in mapped.layers:
        if layer.keys is not None:
            layer.keys, layer.values = on_tensor(layer.keys), on_tensor(layer.values)
    return mapped
