"""The runners of a model beside each other, in this process: each draws the same picture, in turns."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sfumato.config import ModelConfig
from sfumato.core import EAGER, Generation
from sfumato.engine import environment
from sfumato.errors import SfumatoError
from sfumato.sampling import Sampling

if TYPE_CHECKING:
    from sfumato.models.load import Loaded
    from sfumato.runners.choice import Runners

EVERY = "all"
"""In place of names: those that can run here."""

NAMES = (EAGER, "openvino", "compile")
LEAST_STEPS = 4
"""Of a picture; its first step is left out, which waits for texts."""
POLL_S = 0.05
SEED = 1


@dataclass(frozen=True, slots=True)
class Compared:
    """One runner, for one picture at a time."""

    runner: str
    """As `accelerate` has it."""
    computed_by: str
    """What computed each component, as recipes have it."""
    step_s: float
    """Seconds of a denoising step."""
    over_eager: float
    """How many times as fast as that of `eager`, within a round."""
    decibels: float | None
    """Peak signal-to-noise ratio of its picture and that of `eager`; None: they are the same."""
    prepared_s: float
    """Seconds until it could draw, besides those of a picture: conversion or compilation, from nothing on disk."""


def chosen(text: str) -> list[str]:
    """Names from `eager,openvino` or `all`, `eager` first. Raises ValueError for any other."""
    names = [name.strip().lower() for name in text.split(",")]
    if names == [EVERY]:
        return list(NAMES)
    if wrong := [name for name in names if name not in NAMES]:
        raise ValueError(f"{wrong[0]!r} is not one of {', '.join(NAMES)}; or `{EVERY}` for those that can run here")
    return list(dict.fromkeys([EAGER, *names]))


def compared(
    config: ModelConfig,
    device: str,
    names: Sequence[str],
    prompt: str,
    picture: dict[str, Any],
    repeats: int,
    tell: Callable[[str], None],
) -> list[Compared]:
    """Draw `picture` (its size and steps) by each runner. Raises SfumatoError for what is missing here for one."""
    environment.prepare()
    import torch

    from sfumato.models import load
    from sfumato.runners.choice import MISSING, Runners

    for name in names:
        if missing := MISSING[name]() if name in MISSING else "":
            raise SfumatoError(f"--runners {name}: {missing}; or leave it out")
    with tempfile.TemporaryDirectory(prefix="sfumato-bench-") as folder, torch.no_grad():
        model = load.load(replace(config, accelerate=None), device, lambda status: None)
        turns = [_Turn(name, model, Runners(name, Path(folder)), _generation(prompt, picture)) for name in names]
        for turn in turns:
            turn.prepare()
            tell(f"{turn.name}: ready after {turn.prepared_s:.1f} s")
        for _ in range(repeats):
            for turn in turns:
                turn.draw()
        return [turn.result(turns[0]) for turn in turns]


def able(names: Sequence[str], tell: Callable[[str], None]) -> list[str]:
    """Those of `names` that can run here; `tell` gets why others cannot."""
    environment.prepare()
    from sfumato.runners.choice import MISSING

    lacking = {name: missing for name in names if name in MISSING and (missing := MISSING[name]())}
    for name, missing in lacking.items():
        tell(f"{name} is left out: {missing}")
    return [name for name in names if name not in lacking]


def _generation(prompt: str, picture: dict[str, Any]) -> Generation:
    width, height = (int(side) for side in str(picture["size"]).split("x"))
    steps = max(LEAST_STEPS, int(picture["steps"] or 0))
    sampling = Sampling(width=width, height=height, steps=steps, guidance_scale=picture["guidance_scale"])
    return Generation("", prompt, SEED, sampling)


class _Turn:
    """One runner's turns."""

    def __init__(self, name: str, model: Loaded, runners: Runners, generation: Generation) -> None:
        self.name = name
        self.prepared_s = 0.0
        self.steps: list[float] = []
        self._model, self._runners, self._generation = model, runners, generation
        self._kept: dict[str, Any] = {}
        self._image: Image.Image | None = None
        self._computed_by = ""

    def prepare(self) -> None:
        """Draw until nothing is being prepared, and the sizes of this picture have been compared with the module's."""
        began = time.perf_counter()
        self.draw()
        while self._runners.preparing:
            time.sleep(POLL_S)
        ready = time.perf_counter() - began
        again = time.perf_counter()
        self.draw()  # a runner and the module compute a size that is new to both
        self.prepared_s = max(0.0, ready - (time.perf_counter() - again)) if self.name != EAGER else 0.0
        self.steps.clear()

    def draw(self) -> None:
        from sfumato.drawing import draw

        times: list[float] = []
        by = self._runners.of(self._model.computing(), self._kept, None, self._model.config.threads)
        drawn = draw.picture(
            self._model, self._generation, lambda done, total: times.append(time.perf_counter()), None, by
        )
        self.steps.append((times[-1] - times[0]) / (len(times) - 1))
        assert isinstance(drawn.result, Image.Image)
        self._image, self._computed_by = drawn.result, drawn.recipe.runner

    def result(self, eager: _Turn) -> Compared:
        ratios = [slow / own for slow, own in zip(eager.steps, self.steps, strict=True)]
        assert self._image and eager._image
        return Compared(
            self.name, self._computed_by, round(statistics.median(self.steps), 5),
            round(statistics.median(ratios), 4), decibels(eager._image, self._image), round(self.prepared_s, 2),
        )  # fmt: skip


def decibels(one: Image.Image, other: Image.Image) -> float | None:
    """Peak signal-to-noise ratio of two pictures of one size; None: they are equal."""
    import numpy as np

    error = float(np.mean((np.asarray(one.convert("RGB"), float) - np.asarray(other.convert("RGB"), float)) ** 2))
    return round(10 * float(np.log10(255**2 / error)), 1) if error else None
