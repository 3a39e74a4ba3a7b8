"""Guidance in a part of the steps: outside it only the rows with the prompt are computed.

Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
Diffusion Models" (https://arxiv.org/abs/2404.07724). A pipeline that guides computes two rows, `u` without the prompt
and `c` with it, and goes on with `u + s * (c - u)`. Outside the interval it gets `c` for both, which leaves `c` for
every scale: the pipeline need not know of it, and the forward pass has half the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from sfumato.batching import outputs
from sfumato.batching.calls import Call, Fingerprints, Leaf
from sfumato.batching.concatenation import unflatten

MODULES = frozenset({"unet", "transformer", "controlnet"})
"""The modules that compute both rows in each step."""

ROWS = 2
"""Of a picture with guidance."""


Compute: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], Any]


class Interval:
    """The steps of one run that are drawn with guidance; it is told of each step.

    Of `n` steps these are `int(start * n)` to `int(end * n) - 1`, counted from 0, as in diffusers' guiders.
    """

    def __init__(self, start: float, end: float) -> None:
        self._start, self._end = start, end
        self._done = 0
        self._total: int | None = None
        self.count: Callable[[Any], int] | None = None
        """The number of steps of a run that begins with this time step."""
        self.left_out = 0
        """Calls whose first row has no effect."""
        self.fingerprints = Fingerprints()

    @property
    def covers_all(self) -> bool:
        """Whether no step of the run, of which a module has been called, lies outside."""
        total = self._total or 0
        return int(self._start * total) == 0 and int(self._end * total) >= total

    @property
    def covers_none(self) -> bool:
        """Whether no step of the run lies inside."""
        return int(self._start * self.total) >= int(self._end * self.total)

    @property
    def total(self) -> int:
        """Steps of the run; 0 before a module was called."""
        return self._total or 0

    def stepped(self, done: int, total: int) -> None:
        self._done, self._total = done, total

    def may_leave_out(self, name: str) -> bool:
        """Whether the next call of this module may lie outside."""
        return name in MODULES and not (self._total is not None and self._guided(self._total))

    def computed(self, call: Call, compute: Compute) -> Any:
        """The output of `call`: within the interval all of it, else its second row, which stands for both.

        `compute` calls the module with the given arguments.
        """
        if self._total is None and self.count is not None:
            time = call.kwargs["timestep"] if "timestep" in call.kwargs else call.args[1]
            self._total = self.count(torch.as_tensor(time).reshape(-1)[0])
        if call.rows != ROWS or self._total is None or self._guided(self._total):
            return compute(call.args, call.kwargs)
        self.left_out += 1
        if call.key is None:  # it cannot be described, so it takes as long as with guidance
            parts = outputs.split(compute(call.args, call.kwargs), [1] * ROWS, listed=call.listed)
            return outputs.repeated(parts[-1], ROWS)
        return outputs.repeated(compute((), second_row(call)), ROWS)

    def _guided(self, total: int) -> bool:
        return int(self._start * total) <= self._done < int(self._end * total)


def second_row(call: Call) -> dict[str, Any]:
    """The keyword arguments of `call`, which has two rows, for the second one."""
    values = (_SECOND.get(leaf.kind, _whole)(leaf) for leaf in call.leaves)
    arguments: dict[str, Any] = unflatten(call.shape, values)
    return arguments


def _whole(leaf: Leaf) -> Any:
    return leaf.value


def _half(leaf: Leaf) -> Any:
    return leaf.value[len(leaf.value) // ROWS :]


def _half_of_second(leaf: Leaf) -> torch.Tensor:
    rows: torch.Tensor = leaf.value
    return rows[:, rows.shape[1] // ROWS :]


def _half_of_mask(leaf: Leaf) -> Any:
    return None if leaf.value is None else _half(leaf)


_SECOND: Mapping[str, Callable[[Leaf], Any]] = {
    "rows": _half,
    "multi": _half,
    "second": _half_of_second,
    "time": _half,
    "ragged": _half,
    "list": _half,
    "each": _half,
    "mask": _half_of_mask,
}
"""Kind of leaf → its part; any other belongs to all rows."""
