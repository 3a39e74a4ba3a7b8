"""What was computed and how much of it was shared, for those who ask why nothing batches."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

from sfumato.batching.reasons import Reason

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Count:
    """Calls of a module, and the forwards that answered them."""

    calls: int = 0
    forwards: int = 0
    proving: int = 0
    """Forwards that answered nobody: those of proofs."""


class Counts(dict[str, Count]):
    """Module name → its count, with what else is counted by module."""

    def __init__(self) -> None:
        super().__init__()
        self.shared: Counter[tuple[str, int]] = Counter()
        """Module name and the number of calls that a forward answered → such forwards."""
        self.alone: Counter[tuple[str, str]] = Counter()
        """Module name and reason → calls that could not be joined. Those that a proof has refused are not in it."""
        self.unbatched: Counter[tuple[str, Reason]] = Counter()
        """Module name and kind of reason → calls that no other could join, whoever was there."""

    def __missing__(self, name: str) -> Count:
        return self.setdefault(name, Count())

    def add(self, name: str, calls: int, forwards: int, proving: int = 0) -> None:
        count = self[name]
        count.calls += calls
        count.forwards += forwards
        count.proving += proving
        if calls and forwards:
            self.shared[name, calls] += forwards

    def add_unbatched(self, name: str, reason: Reason, detail: str = "") -> None:
        """A call of that module was computed alone, and had to be. What was refused by a proof is logged there."""
        if (name, reason) not in self.unbatched and detail:
            log.info("calls of %s are not batched (%s): %s", name, reason, detail)
        self.unbatched[name, reason] += 1
