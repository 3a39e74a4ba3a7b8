"""Feature caches inside a denoiser (first-block cache, TaylorSeer ...): find the objects that keep their states."""

from __future__ import annotations

import weakref
from typing import Any

_without_cache: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""Modules without a cache, with the `id` of the cache configuration when that was checked.

A module with adapters has thousands of submodules: searching them takes longer than anything else about a view.
"""


def state_managers(module: Any) -> tuple[Any, ...] | None:
    """The objects that keep a state per cache context in `module`: None without a cache, empty without contexts."""
    configuration = id(getattr(module, "_cache_config", None))
    if not hasattr(module, "cache_context") or _without_cache.get(module) == configuration:
        return None
    managers: list[Any] = []
    stateful = [
        hook
        for part in module.modules()
        if "_diffusers_hook" in vars(part)
        for hook in part._diffusers_hook.hooks.values()
        if hook._is_stateful
    ]
    for hook in stateful:
        of_hook = [value for value in vars(hook).values() if type(value).__name__ == "StateManager"]
        if not of_hook:
            return ()
        managers += of_hook
    if not stateful:
        _without_cache[module] = configuration
        return None
    return tuple({id(manager): manager for manager in managers}.values())


def prepare(module: Any, steps: int) -> None:
    """Tell a cache that must know it how many steps the run has whose call the module computes next; 0: unknown."""
    for_steps = getattr(getattr(module, "_cache_config", None), "for_steps", None)
    if steps and for_steps:
        for_steps(steps)


def forget(module: Any) -> None:
    """Search `module` again next time: other code may have added a cache to it."""
    _without_cache.pop(module, None)
