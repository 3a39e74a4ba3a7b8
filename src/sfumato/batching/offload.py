"""Offload modules or layers to main memory until they are called: for `offload`, and after running out of memory.

In diffusers each module of a pipeline offloads the previous one, and the pipeline offloads the last one at its end.
With many requests there is no such order: a module is offloaded when another is called, and the last one when no
request is left.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.hooks import UserCpuOffloadHook, remove_hook_from_module
from diffusers.hooks import apply_group_offloading

log = logging.getLogger(__name__)

LEAVES = {"offload_type": "leaf_level"}


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


def enable_groups(pipeline: Any, device: str, by_block: Callable[[str], bool]) -> None:
    """Keep only the layers that compute on `device` from now on. Call it while no request is inside a module.

    Components for whose name `by_block` is true move block by block: the denoiser, which is only ever called as a
    whole. Of others parts are called too, such as `vae.decode`; there each layer moves by itself. Without streams: a
    layer that is fetched ahead would be the wrong one when requests of different kinds take turns.
    """
    _remove_hooks(pipeline)
    for name, module in pipeline.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        if not getattr(module, "_supports_group_offloading", True):
            log.info("%s stays on %s: its layers cannot be offloaded one by one", name, device)
            module.to(device)
            continue
        unit = {"offload_type": "block_level", "num_blocks_per_group": 1} if by_block(name) else LEAVES
        # diffusers' own modules know which of their arguments must not be moved.
        enable_one = getattr(module, "enable_group_offload", functools.partial(apply_group_offloading, module))
        enable_one(torch.device(device), **unit)


def _remove_hooks(pipeline: Any) -> None:
    pipeline._all_hooks = []
    for module in pipeline.components.values():
        if not isinstance(module, torch.nn.Module):
            continue
        remove_hook_from_module(module, recurse=True)
        # It puts the class's own `forward` on the module, which then looks as if someone had replaced it.
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward


def enabled(pipeline: Any) -> bool:
    """Whether modules of the pipeline are offloaded."""
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
