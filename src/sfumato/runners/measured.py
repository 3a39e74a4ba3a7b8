"""What was measured, kept in a file of the runners' folder: by machine, module and size.

A time depends on a module's code, shapes and precision and not on the values of its weights, so models of one family
share what was measured. Standard library only: `sfumato models` reads it, too.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sfumato.runners import machine
from sfumato.status import RunnerState

FILE = "measured.json"
MODELS = "models"
"""Among the keys of modules: what computed each model's modules, in words."""

GAIN = 1.05
"""A runner that computes fewer calls in the time that the module takes for one is not worth its memory."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one module at one size."""

    at: str
    """The size, for people: 64x64."""
    ratios: Mapping[str, float] = field(default_factory=dict)
    """Runner → how many of its calls took as long as one of the module's own."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Runner → why it does not compute such calls."""
    when: str = ""

    @property
    def chosen(self) -> str:
        """The fastest runner, by its name in `accelerate`; empty: the module itself."""
        best = max(self.ratios, key=lambda name: self.ratios[name], default="")
        return best if best and self.ratios[best] >= GAIN else ""

    def told(self, names: Mapping[str, str]) -> str:
        """In words, with the `names` that runners have in recipes."""
        parts = [
            f"{ratio:.2f} times eager" if name == self.chosen else f"{names.get(name, name)} {ratio:.2f} times eager"
            for name, ratio in self.ratios.items()
        ]
        parts += [f"no {name}: {why}" for name, why in self.refused.items()]
        return f"{', '.join(parts) or 'nothing else computes it'} at {self.at}, measured {self.when}"


def today() -> str:
    return time.strftime("%Y-%m-%d")


class Measurements:
    """The file of one folder. A file that cannot be read, or of another version, is empty."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def of(self, module: str) -> dict[str, Measured]:
        """Size → what was measured of a module on this machine. `module`: its key."""
        measured: dict[str, Measured] = {}
        for size, each in _dict(self._read().get(module)).items():
            with suppress(TypeError):
                measured[size] = Measured(**each)
        return measured

    def put(self, module: str, size: str, measured: Measured) -> None:
        self._write(module, {**_dict(self._read().get(module)), size: asdict(measured)})

    def states(self, model: str) -> tuple[RunnerState, ...]:
        """What computed a model's modules when it was last in memory here."""
        try:
            return tuple(RunnerState(**each) for each in _dict(self._read().get(MODELS)).get(model, ()))
        except TypeError:
            return ()

    def put_states(self, model: str, states: Sequence[RunnerState]) -> None:
        self._write(MODELS, {**_dict(self._read().get(MODELS)), model: [asdict(state) for state in states]})

    def _read(self) -> dict[str, Any]:
        """What is known of this machine."""
        return _dict(self._all().get(machine.key()))

    def _all(self) -> dict[str, Any]:
        try:
            return _dict(json.loads(self._path.read_text()))
        except (OSError, ValueError):
            return {}

    def _write(self, name: str, value: dict[str, Any]) -> None:
        content = {**self._all(), machine.key(): {**self._read(), name: value}}
        with suppress(OSError):  # it is measured again next time
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part = self._path.with_name(f".{FILE}.{os.getpid()}")
            part.write_text(json.dumps(content, indent=1))
            part.replace(self._path)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
