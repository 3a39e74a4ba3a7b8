"""Find pipelines whose requests must run from start to end without switching, as they change shared modules."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import torch
from diffusers import DiffusionPipeline

from sfumato.batching import feature_caches
from sfumato.pipelines import modular, scheduler_calls, source_table

INTRUSIVE = re.compile(
    r"set_attn_processor\(|\.processor = |enable_grad\(|autograd\.grad|\.(named_)?modules\(\)|requires_grad_\(True"
)
"""Source patterns of pipelines that rewire shared modules during a call or compute gradients: PAG, LEdits, SAG,
GLIGEN, Attend-and-Excite, DiffEdit, zero-shot video. Other requests in a batch would be computed with their changes."""


def exclusive(pipeline: Any) -> str:
    """Why this pipeline runs from start to end without switching; empty for most."""
    for part in (pipeline, *(value for value in vars(pipeline).values() if isinstance(value, DiffusionPipeline))):
        if getattr(part, "free_init_enabled", False):
            return "FreeInit runs the whole schedule several times over one state"
        pipeline_class: Any = type(part)
        if reason := _intrusion(pipeline_class) or modular.rewires(part):
            return reason
        for module in vars(part).values():
            if isinstance(module, torch.nn.Module) and feature_caches.state_managers(module) == ():
                return "a cache inside a module keeps one state for all requests"
    return ""


def rewires(kind: Any) -> bool:
    """Whether requests of this pipeline class change its modules while they run."""
    return bool(_intrusion(kind))


def patched(pipeline: Any) -> str:
    """Why a module of `pipeline` may keep a state: its `forward` was replaced, as third-party feature caches do."""
    for name, module in vars(pipeline).items():
        hooked = ("_hf_hook", "_old_forward", "_diffusers_hook")  # accelerate's and diffusers' own
        if isinstance(module, torch.nn.Module) and "forward" in vars(module) and not vars(module).keys() & set(hooked):
            return f"the forward of {name} was replaced by something that may keep a state"
    return ""


@functools.cache
def _intrusion(kind: Any) -> str:
    """Why a pipeline class must not switch: it rewires shared modules, or its source cannot be read; else empty."""
    try:
        row = source_table.row(kind)
        pattern = row["intrusion"] if row else source_table.read(kind, "use of modules", intrusion)
    except source_table.Unreadable as error:
        return str(error)
    return f"its code contains: {pattern}" if pattern else scheduler_calls.unreadable(kind)


def intrusion(kind: Any) -> str:
    """Code of a pipeline that rewires shared modules, read from its source; raises any error of reading it."""
    for block in modular.code_of(kind):
        if match := INTRUSIVE.search(inspect.getsource(block)):
            return match[0]
    for base in kind.__mro__:
        # The base class of all pipelines has such methods, for users to call.
        if base.__module__.startswith(("diffusers.pipelines.pipeline_utils", "diffusers.loaders", "builtins")):
            continue
        if not issubclass(base, DiffusionPipeline) and not base.__module__.startswith("diffusers.pipelines."):
            continue
        if match := INTRUSIVE.search(inspect.getsource(base)):
            return match[0]
    return ""
