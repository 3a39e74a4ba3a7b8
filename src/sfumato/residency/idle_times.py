"""Since when models are idle, and for how long they may be."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class IdleTimes:
    """Of loaded models, by name. `default`: seconds that one stays, unless its file or the request says otherwise."""

    def __init__(self, default: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self._default = default
        self._clock = clock
        self._stays: dict[str, float] = {}
        self._since: dict[str, float] = {}

    def now(self) -> float:
        """Seconds of its clock."""
        return self._clock()

    def stay(self, name: str, *wishes: float | None) -> None:
        """From now on it stays as long as the first of `wishes` (of the request, of the file) that is set says."""
        self._stays[name] = next((wish for wish in wishes if wish is not None), self._default)

    def stay_for_a_request(self, name: str, wish: float | None) -> None:
        """As `stay`, for a model that was ordered: if it is to stay not at all, then until its first request."""
        self.stay(name, wish)
        self._stays[name] = self._stays[name] or math.inf

    def begin(self, name: str) -> None:
        """No request uses it any more."""
        self._since[name] = self._clock()

    def left(self, name: str) -> float:
        """Seconds that an idle model may still stay; infinite if nothing limits them."""
        now = self._clock()
        return self._since.get(name, now) + self.of(name) - now

    def of(self, name: str) -> float:
        """Seconds that it stays once it is idle."""
        return self._stays.get(name, self._default)

    def forget(self, name: str) -> None:
        """It was unloaded."""
        self._stays.pop(name, None)
        self._since.pop(name, None)
