"""Modules that wait in main memory until they are called: `low_vram`, and after running out of memory.

A pipeline that runs alone puts its last module out at its end, and each but the first puts out the one before it.
With many requests on it there is no such order: a module is put out when another is called, and the last when
nobody is left.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import UserCpuOffloadHook

log = logging.getLogger(__name__)


def enable(pipeline: Any, device: str) -> None:
    """From now on, at most one module of the pipeline's sequence is on `device`."""
    pipeline.enable_model_cpu_offload(device=device)
    in_order = set((pipeline.model_cpu_offload_seq or "").split("->"))
    # Those in no order, such as a ControlNet, are called in turns with the denoiser and stay with it.
    modules = [module for name, module in pipeline.components.items() if name in in_order]
    hooks = [hook for hook in pipeline._all_hooks if any(hook.model is module for module in modules)]
    for hook in hooks:
        others = [other for other in hooks if other is not hook]
        hook.hook.prev_module_hook = _Others(others) if others else None


def enabled(pipeline: Any) -> bool:
    return bool(getattr(pipeline, "_all_hooks", None))


def rest(pipeline: Any) -> None:
    """Nobody draws with it any more: put every module out that its hooks have left on the device."""
    if not enabled(pipeline):
        return
    for hook in pipeline._all_hooks:
        hook.offload()
    empty_cache()


def empty_cache() -> None:
    """Give back what the device's allocator keeps for later."""
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()


class _Others(UserCpuOffloadHook):  # type: ignore[misc]
    """What accelerate puts out before a module is called: here every other one that is on the device."""

    def __init__(self, others: Sequence[Any]) -> None:
        self._others = others

    @property
    def model(self) -> Any:
        """One that is there, if any: accelerate looks at it to see whether there is something to put out."""
        return next((hook.model for hook in self._others if _is_out(hook.model)), self._others[0].model)

    def offload(self) -> None:
        for hook in self._others:
            if _is_out(hook.model):
                hook.offload()


def _is_out(module: Any) -> bool:
    """Whether it is elsewhere than in main memory."""
    parameter = next(module.parameters(), None)
    return parameter is not None and parameter.device.type != "cpu"
