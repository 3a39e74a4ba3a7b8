"""Arrival traces for `benchmarks.simulate`: who wants which picture, and when."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BURST = 8.0
"""How many times as many requests arrive in a burst."""
BURST_S = 3.0
PERIOD_S = 60.0
"""Seconds of a burst, and from the beginning of one to that of the next."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One picture."""

    at: float
    """When it arrives, in seconds from the beginning."""
    caller: str
    model: str
    side: int
    """Pixels."""
    steps: int
    low: bool
    """Whether it is of the priority `batch`."""


@dataclass(frozen=True, slots=True)
class Mix:
    """What is wanted: each list has a value and its weight."""

    sides: Sequence[tuple[int, float]]
    steps: Sequence[tuple[int, float]]
    long_steps: int = 50
    long_share: float = 0.05
    """Share of long jobs, which make `long_steps`."""
    low_share: float = 0.2
    """Share of the priority `batch`."""
    models: int = 1
    callers: int = 20

    def drawn(self, dice: random.Random, at: float) -> Wanted:
        steps = self.long_steps if dice.random() < self.long_share else _one_of(dice, self.steps)
        return Wanted(
            at,
            f"caller {dice.randrange(self.callers)}",
            f"model {dice.randrange(self.models)}",
            _one_of(dice, self.sides),
            steps,
            dice.random() < self.low_share,
        )


def _one_of(dice: random.Random, weighted: Sequence[tuple[int, float]]) -> int:
    values, weights = zip(*weighted, strict=True)
    return int(dice.choices(values, weights)[0])


def trace(mix: Mix, count: int, rate: float, seed: int) -> Iterator[Wanted]:
    """`count` pictures at `rate` a second on average: Poisson, and `BURST` times as many in the middle of a period."""
    dice = random.Random(seed)
    calm = rate * PERIOD_S / (PERIOD_S + (BURST - 1) * BURST_S)
    quiet_s = (PERIOD_S - BURST_S) / 2
    rates = itertools.cycle(((quiet_s, calm), (BURST_S, BURST * calm), (quiet_s, calm)))
    at = until = now = 0.0
    for _ in range(count):
        while (after := at + dice.expovariate(now or 1.0)) > until:
            # Poisson has no memory: what would come after the rate has changed is drawn anew from there.
            at = until
            lasts, now = next(rates)
            until += lasts
        at = after
        yield mix.drawn(dice, at)
