"""Whether a module still is what a graph was made of: its layers, their tensors, its adapters and hooks."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
DTYPES = (torch.float32, torch.bfloat16)
PIECES = ("use_tiling", "use_slicing")
"""Attributes of a VAE that decodes in pieces, to take less memory."""


def state_of(module: torch.nn.Module) -> Hashable:
    """Changes when anything about the module does that its forward pass depends on."""
    parts = [(id(part), part.training, id(getattr(part, "processor", None)), *_adapters(part))
             for part in module.modules()]  # fmt: skip
    tensors = [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in _tensors(module)]
    return tuple(parts), tuple(tensors), tuple(bool(getattr(module, name, False)) for name in PIECES)


def why_unserved(module: torch.nn.Module) -> str:
    """Why only the module itself can compute its forward pass; empty if a graph of it can."""
    if _is_quantised(module):
        return why_hooked(module)
    tensors = [tensor for tensor in _tensors(module) if tensor.is_floating_point()]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "it is not on a CPU"
    if others := {str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.dtype not in DTYPES}:
        return f"its weights are {', '.join(sorted(others))}"
    return why_hooked(module)


def why_hooked(module: torch.nn.Module) -> str:
    """Why a forward pass of this module is more than its layers compute; empty if it is not."""
    if _is_quantised(module):
        return "its weights are quantised"
    if any(getattr(module, name, False) for name in PIECES):
        return "it works in pieces, to take less memory"
    for part in module.modules():
        if part.training:
            return "it is in training mode"
        registry = vars(part).get("_diffusers_hook")  # diffusers gives some modules an empty one
        if "forward" in vars(part) or "_hf_hook" in vars(part) or (registry and registry.hooks):
            return "hooks act in it: offload, casting or a feature cache"
        if part._forward_hooks or part._forward_pre_hooks:
            return "hooks act in it"
    return ""


def _is_quantised(module: torch.nn.Module) -> bool:
    kinds = {type(tensor) for tensor in _tensors(module)} - set(PLAIN_TENSORS)
    return bool(kinds) or getattr(module, "hf_quantizer", None) is not None


def copied(module: Any) -> Any:
    """The same layers in other objects, on the same tensors."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


def dtype_of(module: torch.nn.Module) -> torch.dtype:
    """The precision that most of its numbers have."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in _tensors(module):
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def adapters_of(module: torch.nn.Module) -> list[Hashable]:
    """Which adapters act in it, and how strongly."""
    return [adapters for part in module.modules() if (adapters := _adapters(part))]


def _adapters(part: Any) -> tuple[Any, ...]:
    if not isinstance(part, BaseTunerLayer):
        return ()
    scaling = getattr(part, "scaling", None) or {}
    return tuple(part.active_adapters), part.disable_adapters, tuple(sorted(scaling.items()))


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
