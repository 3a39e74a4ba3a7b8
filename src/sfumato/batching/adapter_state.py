"""Track and undo what a request does to the adapters of a shared module.

diffusers scales adapters for one call by iterating over a module's submodules (`scale_lora_layers`). A layer must be
accessed before it can be changed, so layers are tracked from then on; a request that never accesses one pays nothing,
however many layers there are.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

AdapterState: TypeAlias = tuple[tuple[str, ...], bool, dict[str, float]]
"""State of one layer: active adapters, whether they are disabled, and the scale of each."""

Names: TypeAlias = tuple[str, ...] | None


class Adapters:
    """Layers that one request accessed, each with its earlier state."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[Any, AdapterState]] = {}
        self._names: dict[int, Names] = {}
        self._walked: set[int] = set()

    def track(self, part: Any, names: Names = None) -> None:
        """Track all layers in the module `part`, which the request accesses.

        `names`: only the scales of these adapters; which ones act changes with every forward pass.
        """
        if id(part) in self._walked:
            return
        self._walked.add(id(part))
        for layer in part.modules():
            if hasattr(layer, "active_adapters") and hasattr(layer, "scaling"):
                self._names.setdefault(id(layer), names)
                self._before.setdefault(id(layer), (layer, _tracked(layer, names)))

    def changed(self) -> bool:
        return any(not _equal(_tracked(layer, self._names[at]), before) for at, (layer, before) in self._before.items())

    def restore(self) -> None:
        """Restore the exact state: scaling and unscaling leaves rounding errors that would accumulate in the layer."""
        for at, (layer, before) in self._before.items():
            names = self._names[at]
            active, disabled, scaling = before
            now = _tracked(layer, names)
            if now == before:
                continue
            if names is None:
                layer.scaling.clear()
            layer.scaling.update(scaling)
            if names is None and now[0] != active:
                layer.set_adapter(list(active))
            if names is None and now[1] != disabled:
                layer.enable_adapters(not disabled)


def _tracked(layer: Any, names: Names) -> AdapterState:
    if names is None:
        return _state(layer)
    return (), False, {name: layer.scaling[name] for name in names if name in layer.scaling}


def _state(layer: Any) -> AdapterState:
    return tuple(layer.active_adapters), layer.disable_adapters, dict(layer.scaling)


def _equal(one: AdapterState, other: AdapterState) -> bool:
    """Equal up to the rounding error of scaling and unscaling."""
    return (
        one[:2] == other[:2]
        and one[2].keys() == other[2].keys()
        and all(math.isclose(scale, other[2][name], rel_tol=1e-9) for name, scale in one[2].items())
    )
