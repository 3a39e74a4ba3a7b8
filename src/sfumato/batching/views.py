"""A view of a pipeline for one request, with stand-ins in place of the heavy modules.

A view is a shallow copy: tokenizers, processors and modules are shared, schedulers and guiders are copied,
and each module is replaced by a stand-in with the same attributes and class that passes a call on
to the batcher. The modules themselves are never modified, so the
pipeline can be used directly beside its views. Outside a request a stand-in calls the module directly.

A request must not switch to another one while it has changed a shared module or scaled its adapters
(`View.why_no_switch`). Some pipelines do that throughout; their views never switch.
Closing a view restores the changes and reports those that could not be restored.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipelineBlocks

from sfumato.batching import feature_caches, offload
from sfumato.batching.adapted import Selection
from sfumato.batching.adapter_state import Adapters
from sfumato.batching.exclusive import exclusive, patched
from sfumato.batching.guidance import Interval
from sfumato.batching.module_runner import ModuleRunner
from sfumato.batching.reasons import Reason
from sfumato.batching.stand_in import StandIn, current

__all__ = ["StandIn", "View", "close", "exclusive", "forget", "view"]

log = logging.getLogger(__name__)

numbers = itertools.count(1)


class View:
    """What the stand-ins of one view share."""

    def __init__(
        self,
        exclusive: str,
        *,
        tiled: bool = False,
        adapters: Mapping[int, Selection] | None = None,
        runners: Mapping[int, ModuleRunner | None] | None = None,
    ) -> None:
        self.adapters = adapters or {}
        """Id of each module that adapters are loaded for → those of this request."""
        self.runners = {} if exclusive else runners or {}
        """Id of each module whose runner is told → that, or None: the module itself."""
        self.computed_by: dict[str, set[str]] = {}
        """Name of each of them that was called → what has computed it."""
        self._told: set[str] = set()
        self.tiled = tiled
        """Whether its VAE works in tiles for this request."""
        self.exclusive = exclusive
        """Why the whole pipeline runs without switching; empty if it may switch."""
        self.number = next(numbers)
        self.steps: Callable[[], int] = lambda: 0
        """Denoising steps of its run, at its calls of the denoiser, 0 if they are not known; for feature caches."""
        self.interval: Interval | None = None
        """Which steps are drawn with guidance, if not all."""
        self.stand_ins: dict[int, StandIn] = {}
        self.changed: dict[int, str] = {}
        """Id of each module that this request changed → how."""
        self.not_restored: list[str] = []
        """What could not be restored when the view was closed."""
        self._adapters = Adapters()
        self._processors: list[tuple[Any, Any]] = []

    def stand_in(self, module: Any, name: str) -> StandIn:
        stand_in = self.stand_ins.get(id(module))
        if stand_in is None:
            selection = self.adapters.get(id(module))
            acting = selection.module if selection else module
            runner = self.runners.get(id(module)) if acting is module else None
            stand_in = self.stand_ins[id(module)] = StandIn(acting, name, self, selection, runner)
            if id(module) in self.runners:
                self._told.add(name)
            if stand_in._sfumato_tiled:  # no runner knows of tiles
                stand_in._sfumato_without_runner()
            if self.exclusive and hasattr(acting, "attn_processors"):
                self._processors.append((acting, dict(acting.attn_processors)))
        return stand_in

    def note(self, name: str, by: str) -> None:
        """A call of a module was computed by this."""
        if name in self._told:
            self.computed_by.setdefault(name, set()).add(by)

    def why_no_switch(self) -> str:
        """Why this request must not switch now; empty if it may."""
        if self.exclusive or self.changed:
            return self.exclusive or next(iter(self.changed.values()))
        return "adapters are scaled for this request" if self._adapters.changed() else ""

    def track(self, stand_in: StandIn, part: Any) -> None:
        """The request accesses a submodule directly."""
        selection = stand_in._sfumato_selection
        if selection and not selection.plain:
            selection.adapted.activate(selection)
            self._adapters.track(part, selection.names)
        elif getattr(stand_in._sfumato_module, "peft_config", None):
            self._adapters.track(part)

    def reason(self, why_no_switch: str) -> Reason:
        """The category of `why_no_switch`, or of a different torch state if that is empty."""
        if self.exclusive:
            return Reason.EXCLUSIVE
        return Reason.CHANGED if why_no_switch else Reason.STATE

    def close(self) -> None:
        """At the end of a request: restore what its pipeline left changed, and drop its feature-cache states.

        Never raises, as the caller has other requests to serve. What could not be restored is in `not_restored`.
        """
        self._attempt("adapters", self._adapters.restore)
        for module, processors in self._processors:
            self._attempt("attention processors", functools.partial(_put_processors, module, processors))
        for stand_in in self.stand_ins.values():
            self._attempt(stand_in._sfumato_name, stand_in._sfumato_restore)
        self.changed.clear()
        self._processors.clear()
        self._adapters = Adapters()
        self.stand_ins.clear()  # each refers to the view, which would stay until Python's garbage collector runs

    def _attempt(self, label: str, restore: Callable[[], None]) -> None:
        try:
            restore()
        except Exception as error:  # whatever a module raises when it is moved or cast
            log.exception("%s could not be restored at the end of a request", label)
            self.not_restored.append(f"{label}: {type(error).__name__}: {error}")


def view(
    pipeline: Any,
    *,
    foreign: bool = False,
    tiled: bool = False,
    adapters: Mapping[int, Selection] | None = None,
    runners: Mapping[int, ModuleRunner | None] | None = None,
) -> Any:
    """A copy of `pipeline` for one request, of the same class, sharing the weights but no state that a call changes.

    `foreign`: the pipeline comes from a library user, so look for patched modules. `tiled`: its VAE works in
    tiles, for this request only. `adapters`: for each module that adapters are loaded for, by its id, those that act.
    `runners`: what computes modules in their place, by the id of the module; None: the module itself, which is told.
    """
    reason = exclusive(pipeline) or (foreign and patched(pipeline)) or ""
    return _view(pipeline, View(reason, tiled=tiled, adapters=adapters, runners=runners), {}, "")


def expect(pipeline: Any, steps: Callable[[], int]) -> None:
    """Tell the view `pipeline` how many denoising steps its run has; asked when it calls the denoiser."""
    for stand_in in _stand_ins(pipeline):
        stand_in._sfumato_view.steps = steps


def limit_guidance(pipeline: Any, interval: Interval) -> None:
    """Let the view `pipeline` draw with guidance only in these steps; its class must be `guidance.CONCATENATING`."""
    for stand_in in _stand_ins(pipeline):
        stand_in._sfumato_view.interval = interval


def computed_by(pipeline: Any) -> dict[str, set[str]]:
    """Name of each module whose runner is told, and that was called in this view → what has computed it."""
    views = {stand_in._sfumato_view for stand_in in _stand_ins(pipeline)}
    return {name: by for view in views for name, by in view.computed_by.items()}


def close(pipeline: Any) -> list[str]:
    """Close the view `pipeline` and the views inside it; returns what could not be restored."""
    states = {stand_in._sfumato_view for stand_in in _stand_ins(pipeline)}
    for state in states:
        state.close()
    return [what for state in states for what in state.not_restored]


def _stand_ins(pipeline: Any) -> Iterator[StandIn]:
    for value in vars(pipeline).values():
        if type(value) is StandIn:
            yield value
        elif isinstance(value, DiffusionPipeline):
            yield from _stand_ins(value)


def forget(pipeline: Any) -> None:
    """Inspect the modules again: for pipelines that other code may have changed in the meantime."""
    for value in vars(pipeline).values():
        if isinstance(value, DiffusionPipeline):
            forget(value)
        elif isinstance(value, torch.nn.Module):
            feature_caches.forget(value)


def _view(pipeline: Any, shared: View, copies: dict[int, Any], prefix: str) -> Any:
    copied = pipeline.__class__.__new__(pipeline.__class__)
    copies[id(pipeline)] = copied
    for name, value in vars(pipeline).items():
        copied.__dict__[name] = _viewed(value, shared, copies, f"{prefix}{name}", pipeline, copied)
    # It resets the caches and offload hooks of all requests, which one request must not do.
    copied.__dict__["maybe_free_model_hooks"] = _bound(_free_outside, copied)
    return copied


def _free_outside(pipeline: Any) -> None:
    if current():
        return
    # With these hooks it would put new ones on the stand-ins.
    hooks = pipeline.__dict__.pop("_all_hooks", None)
    type(pipeline).maybe_free_model_hooks(pipeline)
    if hooks is not None:
        pipeline._all_hooks = hooks
        offload.offload_all(pipeline)


def _viewed(value: Any, shared: View, copies: dict[int, Any], name: str, pipeline: Any, copied: Any) -> Any:
    if id(value) in copies:
        return copies[id(value)]
    if type(value) is StandIn:
        value = value._sfumato_module
    if isinstance(value, DiffusionPipeline):
        return _view(value, shared, copies, f"{name}.")
    if isinstance(value, torch.nn.Module):
        return shared.stand_in(value, name)
    # Some blocks of a modular pipeline keep what they have made of the stand-ins.
    if (
        hasattr(value, "set_timesteps")
        or isinstance(value, ModularPipelineBlocks)
        or type(value).__module__.startswith("diffusers.guiders")
    ):
        return copies.setdefault(id(value), copy.deepcopy(value))
    if isinstance(value, MethodType) and value.__self__ is pipeline:
        return _bound(value.__func__, copied)
    return value


def _bound(function: Callable[..., Any], owner: Any) -> Callable[..., Any]:
    """Like a bound method of `owner`, stored on it: a real one would be a reference cycle that keeps a run's memory."""
    method, reference = MethodType(function, owner), weakref.ref(owner)

    def bound(*args: Any, **kwargs: Any) -> Any:
        return function(reference(), *args, **kwargs)

    bound.__name__, bound.__doc__ = function.__name__, function.__doc__
    bound.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    return bound


def _put_processors(module: Any, processors: dict[str, Any]) -> None:
    if dict(module.attn_processors) != processors:
        module.set_attn_processor(processors)
