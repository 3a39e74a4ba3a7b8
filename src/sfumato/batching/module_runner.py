"""What may compute the forward pass of a module in its place: faster, with the same numbers up to rounding."""

from __future__ import annotations

import itertools
from typing import Any, Protocol

numbers = itertools.count(1)


class ModuleRunner(Protocol):
    """The runner of one module, chosen for a request at its start. It leaves to the module what it cannot serve."""

    number: int
    """One of `numbers`, and of no other: what was computed by different runners is not the same."""

    def prepare(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, wait: bool = False) -> bool:
        """Make what it needs for such a call, in the background or, with `wait`, now. Whether that is done."""

    def serves(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether it computes such a call now. If not, whoever calls may let the module do it, part by part."""

    def run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str]:
        """The module's output, and the name of what computed it: `EAGER` is the module itself."""
