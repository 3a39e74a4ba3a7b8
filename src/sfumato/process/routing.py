"""Which device draws the next picture: the one that is expected to be done with it first.

A device is expected to be done after

    the steps it has left, of all its pictures, × the measured time of such a step × how slow it is among the devices
    + the time to load the model, where it is not loaded
    + the same for the picture's own steps.

Of what a device has left, pictures of low priority count only for those of low priority: the others overtake them.

So pictures go where their model is loaded already, and a burst on one model spreads to a second device as soon as
loading it there is quicker than waiting. Times of steps are known by model and size of the picture, and are those of a
whole device: eight pictures that share each forward pass make eight steps in the time of one pass.

Plain numbers only: no engine, no clock. `benchmarks.simulate` calls the same code. `choose` looks at each device:
a few microseconds, for a thousand as for two.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

SQUARE = 512 * 512
"""Pixels of a picture whose request does not say them."""
LEAST = 0.25
"""What a step of a small picture takes at least, of one of `SQUARE`: below 256x256 the time hardly falls."""
FIRST_STEP_S = 0.1
"""Assumed time of a step of `SQUARE` pixels before one of that model was measured."""
FIRST_LOAD_S = 10.0
"""Assumed time to load a model before that was measured."""
START_S = 10.0
"""Assumed time until a device that is starting can draw."""
DECAY = 0.98
"""Weight of each step relative to the next in means: about the last fifty count."""
COMPARED = 10.0
"""Steps that a time must be the mean of before a device's own are compared with it."""
SLOWEST = 1000.0
"""A GPU and a CPU are less apart."""
LOAD_WEIGHT = 0.5
"""Weight of the latest load in the running mean of a model's."""


Seconds: TypeAlias = NDArray[np.float64]
"""One number for each device; `_slowness` has no unit."""


class _Kind(NamedTuple):
    """Steps that take the same time."""

    model: str
    size: int
    """Pixels, in powers of the square root of 2 relative to `SQUARE`: a finite number of them."""


@dataclass(slots=True)
class _Picture:
    device: int
    kind: _Kind
    left: float
    low: bool
    stepped_at: float | None = None


@dataclass(slots=True)
class _Mean:
    """Recent sum of one quantity over that of another."""

    sum: float = 0.0
    over: float = 0.0

    def add(self, sum: float, over: float) -> None:
        self.sum = DECAY * self.sum + sum
        self.over = DECAY * self.over + over

    def value(self, unknown: float) -> float:
        return self.sum / self.over if self.over else unknown


class _Model:
    """Where one model is. Times in seconds."""

    def __init__(self, devices: int) -> None:
        self.load_s = FIRST_LOAD_S
        self.load_measured = False
        self.loads: Seconds = np.zeros(devices)
        """What it costs to have it on each device; 0 where it is loaded."""
        self.loaded: set[int] = set()
        self.coming: dict[int, float] = {}
        """Device that loads it → since when."""
        self.step_s = _Mean()
        """Seconds per step, one of `SQUARE` pixels."""


class Router:
    """The load of `devices` devices, numbered from 0. Times are seconds of any clock that does not go back."""

    def __init__(self, devices: int, loaded_models: int = 2) -> None:
        """`loaded_models`: models that a device holds at most; to load another there costs one of them."""
        self._devices = range(devices)
        self._limit = loaded_models
        self._models: dict[str, _Model] = {}
        self._kinds: defaultdict[_Kind, _Mean] = defaultdict(_Mean)
        """Seconds per step, on a device of slowness 1."""
        self._slowness: Seconds = np.ones(devices)
        self._ratios = [_Mean() for _ in self._devices]
        """Seconds that steps took, over those that they were expected to take on a device of slowness 1."""
        self._pictures: dict[str, _Picture] = {}
        self._left: list[dict[bool, defaultdict[_Kind, float]]] = [
            {low: defaultdict(float) for low in (False, True)} for _ in self._devices
        ]
        """Steps left on each device, of pictures of low priority or not."""
        self._waits: dict[bool, Seconds] = {low: np.zeros(devices) for low in (False, True)}
        """Expected seconds until each device has done all that a picture of low priority, or not, waits for there."""
        self._delays = [0.0] * devices
        """Seconds until each device can draw at all."""
        self._there: list[set[str]] = [set() for _ in self._devices]
        """Models that are loaded on each device, or are being loaded."""
        self._stepped_at = [-math.inf] * devices

    def choose(
        self,
        model: str,
        steps: float,
        now: float,
        *,
        pixels: int = SQUARE,
        low: bool = False,
        refused: Collection[int] = (),
    ) -> int:
        """The device for a picture of so many steps and pixels, except those `refused`; the first one of equals.

        `low`: of low priority.
        """
        known = self._model(model)
        loads = self._loads(known, now) if known.coming else known.loads
        own = steps * self._step_s(_kind(model, pixels))
        ends = self._waits[low] + loads + own * self._slowness
        ends[[*refused]] = math.inf
        return int(ends.argmin())

    def wait_s(self, device: int) -> float:
        """Expected seconds until this device has done what it has now; infinite if it cannot draw."""
        return self._waits[True].item(device)

    # What happens to pictures.

    def begin(
        self, id: str, device: int, model: str, steps: float, now: float, *, pixels: int = SQUARE, low: bool = False
    ) -> None:
        """A picture was sent to this device; its model will be loaded there if it is not."""
        kind = _kind(model, pixels)
        self._pictures[id] = picture = _Picture(device, kind, steps, low)
        self._add(picture, steps)
        if model not in self._there[device]:
            self.loading(device, model, now)

    def step(self, id: str, left: float, now: float) -> None:
        """A picture has made progress and has so many steps left."""
        picture = self._pictures[id]
        device, done = picture.device, picture.left - left
        if picture.stepped_at is not None and done > 0:  # else it was prepared, its model loaded, or it begins again
            self._measured(device, picture.kind, now - max(self._stepped_at[device], picture.stepped_at), done)
            self._stepped_at[device] = now
        picture.stepped_at = now
        self._add(picture, -done)
        picture.left = left

    def end(self, id: str) -> None:
        """A picture is drawn, was cancelled, has failed, or goes to another device."""
        picture = self._pictures.pop(id)
        self._add(picture, -picture.left)

    # What happens to devices and models.

    def delay(self, device: int, seconds: float) -> None:
        """The device can draw after so many seconds: 0 when it is up, `START_S` while it starts, else infinite."""
        self._delays[device] = seconds
        self._sum(device)

    def loading(self, device: int, model: str, now: float) -> None:
        """The device begins to load this model, or has got as far as to read it: what it waited for is no load."""
        known = self._model(model)
        known.loaded.discard(device)
        known.coming[device] = now
        self._there[device].add(model)
        self._residents_changed(device)

    def loaded(self, device: int, model: str, now: float) -> None:
        """The device holds this model."""
        known = self._model(model)
        since = known.coming.pop(device, None)
        if since is not None:
            weight = LOAD_WEIGHT if known.load_measured else 1.0
            known.load_s += weight * (now - since - known.load_s)
            known.load_measured = True
            self._price(model)
        known.loaded.add(device)
        self._there[device].add(model)
        self._residents_changed(device)

    def unloaded(self, device: int, model: str) -> None:
        """The device does not hold this model any more, or could not load it."""
        known = self._model(model)
        known.coming.pop(device, None)
        known.loaded.discard(device)
        self._there[device].discard(model)
        self._residents_changed(device)

    def emptied(self, device: int) -> None:
        """The device holds no model any more: its worker has ended."""
        for model in list(self._there[device]):
            self.unloaded(device, model)

    # The times of steps.

    def _step_s(self, kind: _Kind) -> float:
        """Expected time of a step, on a device of slowness 1."""
        mean = self._kinds.get(kind)
        return mean.value(0.0) if mean else self._model(kind.model).step_s.value(FIRST_STEP_S) * _weight(kind)

    def _measured(self, device: int, kind: _Kind, seconds: float, steps: float) -> None:
        """Steps have taken so long."""
        mean, ratio = self._kinds[kind], self._ratios[device]
        if mean.over >= COMPARED:
            ratio.add(seconds, steps * mean.value(0.0))
            self._slowness[device] = max(1 / SLOWEST, min(SLOWEST, ratio.value(1.0)))
        even = seconds / self._slowness.item(device)
        mean.add(even, steps)
        self._model(kind.model).step_s.add(even, steps * _weight(kind))

    def _add(self, picture: _Picture, steps: float) -> None:
        """It has so many more steps left."""
        left = self._left[picture.device][picture.low]
        left[picture.kind] += steps
        if left[picture.kind] <= 0:
            del left[picture.kind]
        self._sum(picture.device)

    def _sum(self, device: int) -> None:
        wait, slowness = self._delays[device], self._slowness.item(device)
        for low, left in self._left[device].items():
            total = 0.0
            for kind, steps in left.items():
                total += steps * self._step_s(kind)
            wait += slowness * total
            self._waits[low][device] = wait

    # The times of loads.

    def _model(self, name: str) -> _Model:
        known = self._models.get(name)
        if known is None:
            known = self._models[name] = _Model(len(self._devices))
            self._price(name)
        return known

    def _residents_changed(self, device: int) -> None:
        for name, known in self._models.items():
            known.loads[device] = self._load_cost(name, known, device)

    def _price(self, model: str) -> None:
        known = self._models[model]
        known.loads[:] = [self._load_cost(model, known, device) for device in self._devices]

    def _load_cost(self, model: str, known: _Model, device: int) -> float:
        """The fuller the device is, the more: on a full one another model leaves, which may have to come back."""
        if device in known.loaded:
            return 0.0
        others = len(self._there[device] - {model})
        return known.load_s * (1 + min(1.0, others / self._limit))

    def _loads(self, known: _Model, now: float) -> Seconds:
        """While devices load the model: the rest of that time there; others would read the same files after them."""
        rest = {device: max(0.0, known.load_s - (now - since)) for device, since in known.coming.items()}
        behind = max(rest.values())
        loads = np.where(known.loads, known.loads + behind, 0.0)
        loads[[*rest]] = [*rest.values()]
        return loads


@functools.lru_cache(maxsize=1024)
def _kind(model: str, pixels: int) -> _Kind:
    return _Kind(model, round(2 * math.log2(max(1, pixels) / SQUARE)))


def _weight(kind: _Kind) -> float:
    """How long a step takes, of one of `SQUARE` pixels."""
    return max(LEAST, float(2 ** (kind.size / 2)))
