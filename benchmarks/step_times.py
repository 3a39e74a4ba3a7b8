"""Measured times of forward passes, as `benchmarks.simulate` takes them for those of a device."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

PACE_S = 5.0


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Times in seconds. A kind of call is `denoise 128`, `decode 128` (with the side in pixels) or `encode`."""

    passes: Mapping[str, Mapping[int, float]]
    """Kind → number of rows → a forward pass."""
    between: Mapping[str, float]
    """Kind → what the host does for each request between such a pass and the next one: its scheduler, its pipeline."""
    begin: float
    """What the host does for a request before its first pass."""
    end: float
    """From a request's last pass to its answer, beside the passes of others."""
    load: float = 10.0
    """A model."""
    turn: float = 0.0
    """Between any two passes: what the loop and the policy do, whatever the requests."""
    rows: int = 2
    """Rows of a request's denoiser call: two with guidance."""
    spread: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Kind → how many times as long as their mean such passes took, all equally likely; none: always that."""
    pace: Sequence[float] = ()
    """How many times as long as on average passes took in each `PACE_S` of the run, as others used the machine too."""
    on_host: bool = True
    """Whether the passes are those of a CPU."""
    _known: dict[tuple[str, int], float] = field(default_factory=dict, compare=False, repr=False)

    def of(self, kind: str, rows: int) -> float:
        """A forward pass of so many rows: between two that were measured, or beyond, on a straight line through two."""
        if (kind, rows) not in self._known:
            self._known[kind, rows] = self._on_a_line(self.passes[kind], rows)
        return self._known[kind, rows]

    def one(self, kind: str, rows: int, dice: random.Random, now: float) -> float:
        """A forward pass that takes longer or shorter by chance, and at this time of the run, as the measured ones."""
        spread = self.spread.get(kind)
        seconds = self.of(kind, rows) * (spread[int(dice.random() * len(spread))] if spread else 1.0)
        return seconds * self.pace[min(len(self.pace) - 1, int(now / PACE_S))] if self.pace else seconds

    @staticmethod
    def _on_a_line(measured: Mapping[int, float], rows: int) -> float:
        if rows in measured or len(measured) == 1:
            known = rows if rows in measured else next(iter(measured))
            return measured[known] * rows / known
        counts = sorted(measured)
        above = next((at for at, count in enumerate(counts) if count > rows), len(counts) - 1)
        one, two = counts[max(0, above - 1)], counts[max(1, above)]
        slope = (measured[two] - measured[one]) / (two - one)
        return max(0.0, measured[one] + slope * (rows - one))

    def together(self, side: int, steps: int, count: int) -> float:
        """So many pictures from start to end in the same forward passes, without others."""
        calls = (("encode", 1, 1), (f"denoise {side}", self.rows, steps))
        before = sum(
            repeats * (self.of(kind, rows * count) + count * self.between[kind] + self.turn)
            for kind, rows, repeats in calls
        )
        return count * self.begin + before + self.of(f"decode {side}", count)

    def alone(self, side: int, steps: int) -> float:
        """From the arrival of a picture to its answer, where nobody else wants one."""
        return self.together(side, steps, 1) + self.end

    @classmethod
    def read(cls, path: Path) -> StepTimes:
        """From the JSON that `benchmarks.simulate_check` writes; its pace is of that run alone."""
        values = json.loads(path.read_text())
        values = values.get("figures", values)
        values = values.get("times", values)
        passes = {
            kind: {int(rows): seconds for rows, seconds in each.items()} for kind, each in values["passes"].items()
        }
        return cls(**{**values, "passes": passes, "pace": ()})

    def as_json(self) -> dict[str, object]:
        return {name: value for name, value in asdict(self).items() if not name.startswith("_")}
