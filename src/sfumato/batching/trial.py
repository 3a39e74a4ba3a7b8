"""Trials: every member of a batch computes its call alone, and the results decide about later batches of that kind.

If a member raises alone, it caused the failure, and the trial has no conclusion: the next batch of its kind is tried
again. A trial also has no conclusion if a member is cancelled before it has computed its call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from sfumato.batching import outputs


class Trial(ABC):
    """Members are numbered by their place in the batch. Each reports once, unless it is cancelled first."""

    def __init__(self, members: int) -> None:
        self.outstanding = set(range(members))
        """Members that have not reported."""
        self.cleared: set[int] = set()
        """Members that were computed alone without an error."""
        self.guilty: set[int] = set()
        """Members that raised alone."""

    def computed(self, member: int, output: Any) -> None:
        """`member` was computed alone, with this output."""
        self.cleared.add(member)
        self._reported(member)

    def raised(self, member: int) -> None:
        self.guilty.add(member)
        self._reported(member)

    def _reported(self, member: int) -> None:
        self.outstanding.discard(member)
        if not self.outstanding and not self.guilty:
            self.conclude()

    @abstractmethod
    def conclude(self) -> None:
        """Called once, when all members are cleared."""


class Blame(Trial):
    """The batch raised. If all members are cleared, batching them caused the error."""

    def __init__(self, members: int, refuse: Callable[[], None]) -> None:
        super().__init__(members)
        self._refuse = refuse

    def conclude(self) -> None:
        self._refuse()


class Comparison(Trial):
    """The batch is the first of its kind: compares each part of its output with what that member gets alone."""

    def __init__(self, parts: list[Any], settle: Callable[[list[float]], None]) -> None:
        """`settle` receives the relative error of each member; inf if it cannot be compared."""
        super().__init__(len(parts))
        self._parts = parts
        self._errors = [0.0] * len(parts)
        self._settle = settle

    def computed(self, member: int, output: Any) -> None:
        self._errors[member] = outputs.difference(self._parts[member], output)
        super().computed(member, output)

    def conclude(self) -> None:
        self._settle(self._errors)
