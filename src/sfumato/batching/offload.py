"""Offload modules to main memory until they are called: for `low_vram`, and after running out of memory.

In diffusers each module of a pipeline offloads the previous one, and the pipeline offloads the last one at its end.
With many requests there is no such order: a module is offloaded when another is called, and the last one when no
request is left.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import UserCpuOffloadHook

log = logging.getLogger(__name__)


def enable(pipeline: Any, device: str) -> None:
    """Keep at most one module of the pipeline's sequence on `device` from now on."""
    pipeline.enable_model_cpu_offload(device=device)
    in_order = set((pipeline.model_cpu_offload_seq or "").split("->"))
    # Modules outside the sequence, such as a ControlNet, alternate with the denoiser and stay with it.
    modules = [module for name, module in pipeline.components.items() if name in in_order]
    hooks = [hook for hook in pipeline._all_hooks if any(hook.model is module for module in modules)]
    for hook in hooks:
        others = [other for other in hooks if other is not hook]
        hook.hook.prev_module_hook = _OffloadOthers(others) if others else None


def enabled(pipeline: Any) -> bool:
    return bool(getattr(pipeline, "_all_hooks", None))


def offload_all(pipeline: Any) -> None:
    """No request uses the pipeline any more: offload every module still on the device."""
    if not enabled(pipeline):
        return
    for hook in pipeline._all_hooks:
        hook.offload()
    empty_cache()


def empty_cache() -> None:
    """Release unused memory cached by the device's allocator."""
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()


class _OffloadOthers(UserCpuOffloadHook):  # type: ignore[misc]
    """What accelerate offloads before a module is called: here every other module on the device."""

    def __init__(self, others: Sequence[Any]) -> None:
        self._others = others

    @property
    def model(self) -> Any:
        """A module on the device, if any: accelerate checks it to see whether there is something to offload."""
        return next((hook.model for hook in self._others if _on_device(hook.model)), self._others[0].model)

    def offload(self) -> None:
        for hook in self._others:
            if _on_device(hook.model):
                hook.offload()


def _on_device(module: Any) -> bool:
    """Whether the module is on a device other than the CPU."""
    parameter = next(module.parameters(), None)
    return parameter is not None and parameter.device.type != "cpu"
