"""How many rows one forward may have: the setting, or less where memory was too short for as many."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from sfumato.batching.calls import Call


class RowLimits:
    """`most` rows, and what was learned for single modules and shapes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.lowered: dict[Hashable, int] = {}

    def of(self, call: Call) -> int:
        """For forwards of this module and shape."""
        return min(self._most, self.lowered.get(_shape(call), self._most)) if self.lowered else self._most

    def halve(self, calls: Sequence[Call]) -> int:
        """So many rows did not fit into memory: the limit of their module and shape from now on."""
        limit = max(1, sum(call.rows for call in calls) // 2)
        self.lowered[_shape(calls[0])] = limit
        return limit

    def clear(self) -> None:
        self.lowered.clear()


def _shape(call: Call) -> Hashable:
    """Module and shapes, without rows or contents."""
    shapes = [(leaf.path, leaf.value.shape[1:]) for leaf in call.leaves if leaf.kind in ("rows", "multi", "ragged")]
    return (id(call.module), call.method, tuple(shapes))
