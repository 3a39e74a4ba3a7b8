"""What of a module is kept layer by layer, in hooks that a twin of it does not have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled


def waits_by_layer(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether layers of these wait in main memory, one by one."""
    return any(_is_group_offload_enabled(module) for module in modules)


def is_cast_by_layer(module: torch.nn.Module) -> bool:
    """Whether its layers are cast for each call: peft would make a LoRA's tensors in the dtype they are stored in."""
    hooks: list[Any] = [getattr(part, "_diffusers_hook", None) for part in module.modules()]
    return any(hook and hook.get_hook("layerwise_casting") for hook in hooks)


def has_feature_cache(modules: Iterable[Any]) -> bool:
    """Whether one of these keeps results of its blocks between steps."""
    return any(getattr(module, "_cache_config", None) is not None for module in modules)
