"""Counters of module calls and forward passes, to see what was batched and why something was not."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

from sfumato.batching.reasons import Reason

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Count:
    """Calls of a module, and the forward passes that answered them."""

    calls: int = 0
    forwards: int = 0
    proving: int = 0
    """Forward passes of proofs, which answer no call."""


class Counts(dict[str, Count]):
    """Module name → its count, with further counters per module."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_sizes: Counter[tuple[str, int]] = Counter()
        """Module name and number of calls that a forward pass answered → number of such forward passes."""
        self.alone_because: Counter[tuple[str, str]] = Counter()
        """Module name and reason → calls that could not be batched, without those that a proof has refused."""
        self.unbatched: Counter[tuple[str, Reason]] = Counter()
        """Module name and category of reason → calls that could not be batched with any other."""

    def __missing__(self, name: str) -> Count:
        return self.setdefault(name, Count())

    def add(self, name: str, calls: int, forwards: int, proving: int = 0) -> None:
        count = self[name]
        count.calls += calls
        count.forwards += forwards
        count.proving += proving
        if calls and forwards:
            self.batch_sizes[name, calls] += forwards

    def add_unbatched(self, name: str, reason: Reason, detail: str = "") -> None:
        """A call of this module had to be computed alone. Refusals by a proof are logged elsewhere."""
        if (name, reason) not in self.unbatched and detail:
            log.info("calls of %s are not batched (%s): %s", name, reason, detail)
        self.unbatched[name, reason] += 1
