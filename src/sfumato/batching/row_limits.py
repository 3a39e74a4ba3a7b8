"""Maximum rows of a forward pass: the setting, or less where more ran out of memory."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from sfumato.batching.calls import Call


class RowLimits:
    """The limit `max_rows`, and lower limits for single modules and shapes."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self.lowered: dict[Hashable, int] = {}

    def of(self, call: Call) -> int:
        """The limit for forward passes of this module and shape."""
        return min(self._max_rows, self.lowered.get(_shape(call), self._max_rows)) if self.lowered else self._max_rows

    def halve(self, calls: Sequence[Call]) -> int:
        """The rows of `calls` did not fit into memory: halve and return the limit for their module and shape."""
        limit = max(1, sum(call.rows for call in calls) // 2)
        self.lowered[_shape(calls[0])] = limit
        return limit

    def clear(self) -> None:
        self.lowered.clear()


def _shape(call: Call) -> Hashable:
    """Module and shapes, without rows and contents."""
    shapes = [(leaf.path, leaf.value.shape[1:]) for leaf in call.leaves if leaf.kind in ("rows", "multi", "ragged")]
    return (id(call.module), call.method, tuple(shapes))
