"""Feature caches inside a denoiser (first-block cache, TaylorSeer ...): what keeps their states."""

from __future__ import annotations

import weakref
from typing import Any

_none: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""Modules in which no cache was found, with the `id` of the cache's configuration at that time.

A module with adapters has thousands of parts: looking through them takes longer than all else about a view.
"""


def state_managers(module: Any) -> tuple[Any, ...] | None:
    """What keeps states per cache context in `module`: None without a cache, empty if it knows no contexts."""
    configuration = id(getattr(module, "_cache_config", None))
    if not hasattr(module, "cache_context") or _none.get(module) == configuration:
        return None
    found: list[Any] = []
    stateful = [
        hook
        for part in module.modules()
        if "_diffusers_hook" in vars(part)
        for hook in part._diffusers_hook.hooks.values()
        if hook._is_stateful
    ]
    for hook in stateful:
        managers = [value for value in vars(hook).values() if type(value).__name__ == "StateManager"]
        if not managers:
            return ()
        found += managers
    if not stateful:
        _none[module] = configuration
        return None
    return tuple({id(manager): manager for manager in found}.values())


def forget(module: Any) -> None:
    """Look through it anew next time: something that may have put a cache into it has had its hands on it."""
    _none.pop(module, None)
