"""Pipelines whose requests run from start to end without switching: others would see what they do to shared modules."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import torch
from diffusers import DiffusionPipeline

from sfumato.batching import feature_caches
from sfumato.pipelines import scheduler_calls, source_table

INTRUSIVE = re.compile(
    r"set_attn_processor\(|\.processor = |enable_grad\(|autograd\.grad|\.(named_)?modules\(\)|requires_grad_\(True"
)
"""Source patterns of pipelines that rewire shared modules during a call or compute gradients: PAG, LEdits, SAG,
GLIGEN, Attend-and-Excite, DiffEdit, zero-shot video. Batched requests would be computed with their rewiring."""


def exclusive(pipeline: Any) -> str:
    """Why this pipeline runs from start to end without switching; empty for most."""
    for each in (pipeline, *(value for value in vars(pipeline).values() if isinstance(value, DiffusionPipeline))):
        if getattr(each, "free_init_enabled", False):
            return "FreeInit runs the whole schedule several times over one state"
        kind: Any = type(each)
        if reason := _intrusion(kind):
            return reason
        for module in vars(each).values():
            if isinstance(module, torch.nn.Module) and feature_caches.state_managers(module) == ():
                return "a cache inside a module keeps one state for all requests"
    return ""


def patched(pipeline: Any) -> str:
    """Which module has a replaced `forward`, as third-party feature caches do to keep a state."""
    for name, module in vars(pipeline).items():
        hooked = ("_hf_hook", "_old_forward", "_diffusers_hook")  # accelerate's and diffusers' own
        if isinstance(module, torch.nn.Module) and "forward" in vars(module) and not vars(module).keys() & set(hooked):
            return f"the forward of {name} was replaced by something that may keep a state"
    return ""


@functools.cache
def _intrusion(kind: Any) -> str:
    """That a pipeline rewires shared modules, or that nobody knows."""
    try:
        known = source_table.row(kind)
        word = known["intrusion"] if known else source_table.read(kind, "use of modules", intrusion)
    except source_table.Unreadable as error:
        return str(error)
    return f"its code contains: {word}" if word else scheduler_calls.unreadable(kind)


def intrusion(kind: Any) -> str:
    """Code of a pipeline that rewires shared modules, read from its source. Raises what that makes this code raise."""
    for base in kind.__mro__:
        # The base class of all pipelines has such methods, for users to call.
        if base.__module__.startswith(("diffusers.pipelines.pipeline_utils", "diffusers.loaders", "builtins")):
            continue
        if not issubclass(base, DiffusionPipeline) and not base.__module__.startswith("diffusers.pipelines."):
            continue
        if found := INTRUSIVE.search(inspect.getsource(base)):
            return found[0]
    return ""
