"""Attention over a large picture is computed for a part of its queries at a time, with time for others in between.

A VAE's attention over the latents of 1024x1024 is one operation, and may take longer than all steps of ten small
pictures. Each query attends to all keys and to no other query, so a part of them is computed by the same call of torch.
On a CPU it is the same bit for bit: there torch computes blocks of 256 queries, each by itself, if it has at least 768
(aten/src/ATen/native/cpu/FlashAttentionKernel.cpp). tests/test_upstream_contract.py would say if that changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

QUERIES = 1024
"""Queries at a time for each thread; a multiple of 256, and at least 768."""


class DividedAttention(TorchFunctionMode):
    """While it is entered, `between` is called between two parts of a long attention on the host."""

    def __init__(self, between: Callable[[], None]) -> None:
        super().__init__()
        self._between = between

    @contextmanager
    def away(self) -> Iterator[None]:
        """Others compute inside; what they compute is not divided here."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self.__enter__()  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and _divisible(*args, **kwargs):
            return self._by_parts(*args, **kwargs)
        return func(*args, **kwargs)

    def _by_parts(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        for queries in torch.split(query, _sizes(query.shape[-2]), dim=-2):
            if parts:
                self._between()  # torch has taken this mode away in here
            parts.append(functional.scaled_dot_product_attention(queries, *args, **kwargs))
        return torch.cat(parts, dim=-2)


def _divisible(
    query: torch.Tensor, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    **others: Any,
) -> bool:  # fmt: skip
    """Whether its queries have nothing of their own besides their values, and are many. Arguments as torch has them."""
    plain = attn_mask is None and not dropout_p and not is_causal
    return plain and query.device.type == "cpu" and len(_sizes(query.shape[-2])) > 1


def _sizes(count: int) -> list[int]:
    """Equal ones, and what is left over with the last one: a small part would be computed in smaller blocks."""
    size = QUERIES * torch.get_num_threads()
    parts = max(1, count // size)
    return [size] * (parts - 1) + [count - size * (parts - 1)]
