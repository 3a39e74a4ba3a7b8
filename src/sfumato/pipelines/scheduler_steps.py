"""Wrap a scheduler's `step`.

`scheduler.step = something(scheduler.step)` would be a reference cycle: the scheduler refers to the step, and the step
to the scheduler. A solver's state, including latents, would stay in memory until Python's garbage collector runs.
So the step belongs to a generated subclass, and its state is an attribute of the scheduler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeAlias

import torch

StepWrapper: TypeAlias = Callable[..., Any]
"""Called with the scheduler, its own step (bound), and the arguments of a step; returns what the step returns."""

GENERATOR, WRAPPER = "_sfumato_generator", "_sfumato_around"
"""Attributes of a scheduler."""


def set_generator(scheduler: Any, generator: torch.Generator | list[torch.Generator]) -> None:
    """Make each step draw its noise from `generator`, unless it is called with another one."""
    setattr(_with_step_class(scheduler), GENERATOR, generator)


def wrap_step(scheduler: Any, wrapper: StepWrapper) -> None:
    """Call `around(scheduler, step, *args, **kwargs)` for each step.

    `wrapper` must not refer to the scheduler. A copy of the scheduler calls it too, passing itself.
    """
    setattr(_with_step_class(scheduler), WRAPPER, _Shared(wrapper))


class _Shared:
    """Not copied together with the scheduler."""

    def __init__(self, wrapper: StepWrapper) -> None:
        self.wrapper = wrapper

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class _Step:
    """The class attribute `step`: the original `step`, plus what was set on the instance."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __get__(self, scheduler: Any, kind: type | None = None) -> Any:
        if scheduler is None:
            return self.original
        step: Any = MethodType(self.original, scheduler)
        state = vars(scheduler)
        if GENERATOR in state:
            step = functools.partial(step, generator=state[GENERATOR])
        if WRAPPER in state:
            # Not a closure, which the frames of an error would keep alive. Pipelines inspect its signature.
            step = functools.update_wrapper(functools.partial(state[WRAPPER].wrapper, scheduler, step), step)
        return step


def _with_step_class(scheduler: Any) -> Any:
    kind: Any = type(scheduler)
    if not isinstance(vars(kind).get("step"), _Step):
        scheduler.__class__ = _class(kind)
    return scheduler


@functools.cache
def _class(kind: Any) -> type:
    """A subclass of `kind` of the same name, with a `_Step`."""
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), {"step": _Step(kind.step), **names})
