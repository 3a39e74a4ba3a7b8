"""A scheduler whose `step` does more than its class's.

`scheduler.step = something(scheduler.step)` would be a cycle: the scheduler refers to the step, and the step to the
scheduler. What a solver keeps of a run, latents among them, would stay in memory until Python's collector comes by.
So the step belongs to a class that is made for it, and what it needs to know is an attribute of the scheduler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeAlias

import torch

Around: TypeAlias = Callable[..., Any]
"""Called with the scheduler, its own step (bound), and the arguments of a step; returns what the step returns."""

GENERATOR, AROUND = "_sfumato_generator", "_sfumato_around"
"""Attributes of a scheduler."""


def with_noise_of(scheduler: Any, generator: torch.Generator | list[torch.Generator]) -> None:
    """Let each step draw its noise from `generator`, unless it is called with another one."""
    setattr(_enriched(scheduler), GENERATOR, generator)


def surround(scheduler: Any, around: Around) -> None:
    """Let `around(scheduler, step, *args, **kwargs)` be called for each step.

    `around` must not refer to the scheduler. A copy of the scheduler calls it as well, with itself.
    """
    setattr(_enriched(scheduler), AROUND, _Shared(around))


class _Shared:
    """Not copied when the scheduler is."""

    def __init__(self, around: Around) -> None:
        self.around = around

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class _Step:
    """The attribute `step` of the class: what its own `step` was, with what the instance has asked for."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own

    def __get__(self, scheduler: Any, kind: type | None = None) -> Any:
        if scheduler is None:
            return self.own
        step: Any = MethodType(self.own, scheduler)
        state = vars(scheduler)
        if GENERATOR in state:
            step = functools.partial(step, generator=state[GENERATOR])
        if AROUND in state:
            # No closure, which the frames of an error would keep. Pipelines read its signature to learn what it takes.
            step = functools.update_wrapper(functools.partial(state[AROUND].around, scheduler, step), step)
        return step


def _enriched(scheduler: Any) -> Any:
    kind: Any = type(scheduler)
    if not isinstance(vars(kind).get("step"), _Step):
        scheduler.__class__ = _class(kind)
    return scheduler


@functools.cache
def _class(kind: Any) -> type:
    """`kind` under its own name, with a `_Step`."""
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), {"step": _Step(kind.step), **names})
