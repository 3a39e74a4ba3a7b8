"""Which device draws the next picture: the one that is expected to be done with it first.

A device is expected to be done after

    the steps it has left, of all its pictures, × its measured time per step of their models
    + the time to load the model, where it is not loaded
    + the picture's own steps × the time per step of its model there.

So pictures go where their model is loaded already, and a burst on one model spreads to a second device as soon as
loading it there is quicker than waiting. The time per step is that of the whole device: eight pictures that share each
forward pass make eight steps in the time of one pass. Steps need not be whole: whoever calls counts one of a larger
picture as more (`steps_of`).

Plain numbers only: no engine, no clock. `benchmarks.simulate` calls the same code. `choose` looks at each device: about
1 µs for two, 0.1 ms for a thousand.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

SQUARE = 512 * 512
"""Pixels of a picture of which a step counts as one."""
LEAST = 0.25
"""What a step of a small picture counts as at least: below 256x256 its time hardly falls."""
FIRST_STEP_S = 0.1
"""Assumed time per step of a model before one was measured."""
FIRST_LOAD_S = 10.0
"""Assumed time to load a model before that was measured."""
START_S = 10.0
"""Assumed time until a device that is starting can draw."""
DECAY = 0.98
"""Weight of each step relative to the next, in the mean time per step: about the last fifty count."""
LOAD_WEIGHT = 0.5
"""Weight of the latest load in the running mean of a model's."""


def steps_of(steps: float, pixels: int) -> float:
    """What so many steps of a picture of so many pixels count as."""
    return steps * max(LEAST, pixels / SQUARE)


@dataclass(slots=True)
class _Picture:
    device: int
    model: str
    left: float
    stepped_at: float | None = None


@dataclass(slots=True)
class _Mean:
    """Mean time of recent steps of one model on one device, in seconds."""

    seconds: float = 0.0
    steps: float = 0.0

    def add(self, seconds: float, steps: float) -> float:
        self.seconds = DECAY * self.seconds + seconds
        self.steps = DECAY * self.steps + steps
        return self.seconds / self.steps


class _Model:
    """What is known of one model on each device. Times in seconds."""

    def __init__(self, devices: int) -> None:
        self.step_s = [FIRST_STEP_S] * devices
        self.means: list[_Mean | None] = [None] * devices
        self.load_s = FIRST_LOAD_S
        self.loads: list[float] = [0.0] * devices
        """What it costs to have it on each device; 0 where it is loaded."""
        self.loaded: set[int] = set()
        self.coming: dict[int, float] = {}
        """Device that loads it → since when."""
        self.load_measured = False

    def measured(self, device: int, seconds: float, steps: float) -> None:
        mean = self.means[device]
        if mean is None:
            if not any(self.means):
                self.step_s = [seconds / steps] * len(self.step_s)  # what others are taken for until they are measured
            mean = self.means[device] = _Mean()
        self.step_s[device] = mean.add(seconds, steps)


class Router:
    """The load of `devices` devices, numbered from 0. Times are seconds of any clock that does not go back."""

    def __init__(self, devices: int, loaded_models: int = 2) -> None:
        """`loaded_models`: models that a device holds at most; to load another there costs one of them."""
        self._devices = range(devices)
        self._limit = loaded_models
        self._models: dict[str, _Model] = {}
        self._pictures: dict[str, _Picture] = {}
        self._left: list[defaultdict[str, float]] = [defaultdict(float) for _ in self._devices]
        """Steps left on each device, by model."""
        self._waits = [0.0] * devices
        """Expected seconds until each device has done all its steps."""
        self._delays = [0.0] * devices
        """Seconds until each device can draw at all."""
        self._there: list[set[str]] = [set() for _ in self._devices]
        """Models that are loaded on each device, or are being loaded."""
        self._stepped_at = [-math.inf] * devices

    def choose(self, model: str, steps: float, now: float, refused: Collection[int] = ()) -> int:
        """The device for a picture of so many steps, except those `refused`; the first one of equals."""
        known = self._model(model)
        loads = self._loads(known, now) if known.coming else known.loads
        ends = [
            wait + load + steps * step_s for wait, load, step_s in zip(self._waits, loads, known.step_s, strict=True)
        ]
        for device in refused:
            ends[device] = math.inf
        return ends.index(min(ends))

    def wait_s(self, device: int) -> float:
        """Expected seconds until this device has done what it has now; infinite if it cannot draw."""
        return self._waits[device]

    # What happens to pictures.

    def begin(self, id: str, device: int, model: str, steps: float, now: float) -> None:
        """A picture was sent to this device; its model will be loaded there if it is not."""
        self._pictures[id] = _Picture(device, model, steps)
        self._add(device, model, steps)
        if model not in self._there[device]:
            self.loading(device, model, now)

    def step(self, id: str, left: float, now: float) -> None:
        """A picture has made progress and has so many steps left."""
        picture = self._pictures[id]
        device, model = picture.device, picture.model
        done = picture.left - left
        if picture.stepped_at is not None and done > 0:  # else it was prepared, its model loaded, or it begins again
            self._model(model).measured(device, now - max(self._stepped_at[device], picture.stepped_at), done)
            self._stepped_at[device] = now
        picture.stepped_at = now
        self._add(device, model, -done)
        picture.left = left

    def end(self, id: str) -> None:
        """A picture is drawn, was cancelled, has failed, or goes to another device."""
        picture = self._pictures.pop(id)
        self._add(picture.device, picture.model, -picture.left)

    # What happens to devices and models.

    def delay(self, device: int, seconds: float) -> None:
        """The device can draw after so many seconds: 0 when it is up, `START_S` while it starts, else infinite."""
        self._delays[device] = seconds
        self._add(device, "", 0)

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
        known.loaded.add(device)
        self._there[device].add(model)
        self._residents_changed(device)
        self._price(model)

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

    # The sums.

    def _model(self, name: str) -> _Model:
        known = self._models.get(name)
        if known is None:
            known = self._models[name] = _Model(len(self._devices))
            self._price(name)
        return known

    def _add(self, device: int, model: str, steps: float) -> None:
        left = self._left[device]
        left[model] += steps
        if left[model] <= 0:
            del left[model]
        self._waits[device] = self._delays[device] + sum(
            steps * self._model(name).step_s[device] for name, steps in left.items()
        )

    def _residents_changed(self, device: int) -> None:
        for name, known in self._models.items():
            known.loads[device] = self._load_cost(name, known, device)

    def _price(self, model: str) -> None:
        known = self._models[model]
        known.loads = [self._load_cost(model, known, device) for device in self._devices]

    def _load_cost(self, model: str, known: _Model, device: int) -> float:
        """The fuller the device is, the more: on a full one another model leaves, which may have to come back."""
        if device in known.loaded:
            return 0.0
        others = len(self._there[device] - {model})
        return known.load_s * (1 + min(1.0, others / self._limit))

    def _loads(self, known: _Model, now: float) -> list[float]:
        """While devices load the model: the rest of that time there; others would read the same files after them."""
        rest = {device: max(0.0, known.load_s - (now - since)) for device, since in known.coming.items()}
        behind = max(rest.values())
        return [
            rest[device] if device in rest else load + behind if load else 0.0
            for device, load in enumerate(known.loads)
        ]
