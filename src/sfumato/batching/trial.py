"""A batch whose members compute their calls alone as well: what is known of each, and what it shows once all have.

A member that raises alone is guilty of what went wrong, and nothing else is concluded: the next batch of its kind is
tried again. Nor is anything where a member was cancelled before it had computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from sfumato.batching import outputs


class Trial(ABC):
    """Members are numbered by their place in the batch. Each reports once, unless it is cancelled before."""

    def __init__(self, members: int) -> None:
        self.outstanding = set(range(members))
        """Those that have not reported."""
        self.cleared: set[int] = set()
        """Those that could be computed alone."""
        self.guilty: set[int] = set()
        """Those that raised alone."""

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
        """Called once, when every member is cleared."""


class Blame(Trial):
    """The batch raised. Where every member is cleared, the fault is that they were joined."""

    def __init__(self, members: int, refuse: Callable[[], None]) -> None:
        super().__init__(members)
        self._refuse = refuse

    def conclude(self) -> None:
        self._refuse()


class Comparison(Trial):
    """The batch is the first of its kind: is each part of its output what that member gets alone?"""

    def __init__(self, parts: list[Any], settle: Callable[[list[float]], None]) -> None:
        """`settle` is told by how much each member differed, relative; inf where it cannot be compared."""
        super().__init__(len(parts))
        self._parts = parts
        self._errors = [0.0] * len(parts)
        self._settle = settle

    def computed(self, member: int, output: Any) -> None:
        self._errors[member] = outputs.difference(self._parts[member], output)
        super().computed(member, output)

    def conclude(self) -> None:
        self._settle(self._errors)
