"""A view of a pipeline for one request, with stand-ins in place of the heavy modules.

A view is a shallow copy: tokenizers, processors and modules are shared, schedulers and guiders are copied,
and each module is replaced by a stand-in with the same attributes and class that passes a call on
to the batcher. The modules themselves are never modified, so the
pipeline can be used directly beside its views. Outside a request a stand-in calls the module directly.

A request must not switch to another one while it has changed a shared module or scaled its adapters
(`View.occupied`). Some pipelines do that throughout; their views never switch.
Closing a view restores the changes and reports those that could not be restored.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType, MethodType
from typing import Any

import greenlet  # type: ignore[import-untyped]
import torch
from diffusers import DiffusionPipeline

from sfumato.batching import feature_caches
from sfumato.batching.adapter_state import Adapters
from sfumato.batching.calls import target
from sfumato.batching.reasons import Reason
from sfumato.pipelines import compat, tiling

log = logging.getLogger(__name__)

METHODS = frozenset({"forward", "encode", "decode", "get_text_features", "get_image_features"})
"""The methods that a stand-in intercepts besides `__call__`."""

MUTATORS = re.compile(
    r"(to|cuda|cpu|half|float|bfloat16|double|type|to_empty|train|eval|requires_grad_|apply|load_\w+|register_\w+"
    r"|(enable|disable)_\w+|set_\w+|(un)?fuse_\w+|add_\w*adapter\w*|delete_adapters?|compile|resize_\w+)$"
)
"""Names of methods that change a module for all requests."""

GETTERS = frozenset({"add_embedding", "add_time_proj", "register_buffer_names", "set_extra_state"})
"""Names that match `MUTATORS` but change nothing."""

PARTS = frozenset({"modules", "named_modules", "children", "named_children", "get_submodule", "_modules"})
"""Names that expose submodules, which can then be changed without the stand-in noticing."""

READERS = frozenset({
    ("diffusers.pipelines.pipeline_utils", "_execution_device"),
    ("diffusers.hooks.group_offloading", "_get_top_level_group_offload_hook"),
    ("diffusers.hooks.group_offloading", "_is_group_offload_enabled"),
})  # fmt: skip
"""Functions, by module and name, that iterate over all submodules in each request but change none."""

INTRUSIVE = re.compile(
    r"set_attn_processor\(|\.processor = |enable_grad\(|autograd\.grad|\.(named_)?modules\(\)|requires_grad_\(True"
)
"""Source patterns of pipelines that rewire shared modules during a call or compute gradients: PAG, LEdits, SAG,
GLIGEN, Attend-and-Excite, DiffEdit, zero-shot video. Batched requests would be computed with their rewiring."""

numbers = itertools.count(1)


class Asker(greenlet.greenlet):  # type: ignore[misc]
    """The greenlet of a request: stand-ins called inside it pass their calls to it."""

    def ask(self, stand_in: StandIn, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class View:
    """What the stand-ins of one view share."""

    def __init__(self, exclusive: str, *, tiled: bool = False) -> None:
        self.tiled = tiled
        """Whether its VAE works in tiles for this request."""
        self.exclusive = exclusive
        """Why the whole pipeline runs without switching; empty if it may switch."""
        self.number = next(numbers)
        self.stand_ins: dict[int, StandIn] = {}
        self.changed: dict[int, str] = {}
        """Id of each module that this request changed → how."""
        self.left: list[str] = []
        """What could not be restored when the view was closed."""
        self._adapters = Adapters()
        self._processors: list[tuple[Any, Any]] = []

    def stand_in(self, module: Any, name: str) -> StandIn:
        made = self.stand_ins.get(id(module))
        if made is None:
            made = self.stand_ins[id(module)] = StandIn(module, name, self)
            if self.exclusive and hasattr(module, "attn_processors"):
                self._processors.append((module, dict(module.attn_processors)))
        return made

    def occupied(self) -> str:
        """Why this request must not switch now; empty if it may."""
        if self.exclusive or self.changed:
            return self.exclusive or next(iter(self.changed.values()))
        return "adapters are scaled for this request" if self._adapters.changed() else ""

    def hand_out(self, stand_in: StandIn, part: Any) -> None:
        """The request accesses a submodule directly."""
        if getattr(stand_in._sfumato_module, "peft_config", None):
            self._adapters.hand_out(part)

    def reason(self, occupied: str) -> Reason:
        """The category of `occupied`, or of a different torch state if that is empty."""
        if self.exclusive:
            return Reason.EXCLUSIVE
        return Reason.CHANGED if occupied else Reason.STATE

    def close(self) -> None:
        """At the end of a request: restore what its pipeline left changed, and drop its feature-cache states.

        Never raises, as the caller has other requests to serve. What could not be restored is in `left`.
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

    def _attempt(self, what: str, restore: Callable[[], None]) -> None:
        try:
            restore()
        except Exception as error:  # whatever a module raises when it is moved or cast
            log.exception("%s could not be restored at the end of a request", what)
            self.left.append(f"{what}: {type(error).__name__}: {error}")


class StandIn:
    """Proxy for `module`: calls go to the batcher, everything else to the module."""

    __slots__ = (
        "__weakref__",
        "_sfumato_context",
        "_sfumato_module",
        "_sfumato_name",
        "_sfumato_place",
        "_sfumato_stateful",
        "_sfumato_view",
    )

    def __init__(self, module: Any, name: str, view: View) -> None:
        put = functools.partial(object.__setattr__, self)
        put("_sfumato_module", module)
        put("_sfumato_name", name)
        put("_sfumato_view", view)
        put("_sfumato_context", None)
        put("_sfumato_place", None)
        put("_sfumato_stateful", feature_caches.state_managers(module))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._sfumato_module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _ask(self, "__call__", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            value = getattr(self._sfumato_module, name)
        except AttributeError:
            if compat.is_itself(self._sfumato_module, name):
                return self
            raise
        if isinstance(value, torch.nn.Module):
            self._sfumato_view.hand_out(self, value)
            return value
        if name in PARTS and not _only_reads(sys._getframe(1)):
            self._sfumato_view.hand_out(self, self._sfumato_module)
        if name in METHODS:
            return _asking(self, name, value)
        if name == "cache_context" and callable(value):
            return functools.partial(_cache_context, self)
        if name == "to":
            return functools.partial(_to, self)
        if callable(value) and MUTATORS.match(name) and name not in GETTERS:
            return _changing(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        _note_change(self, f"sets {name}")
        setattr(self._sfumato_module, name, value)

    def __delattr__(self, name: str) -> None:
        _note_change(self, f"deletes {name}")
        delattr(self._sfumato_module, name)

    def __repr__(self) -> str:
        return f"<stand-in for {self._sfumato_module!r}>"

    def _sfumato_compute(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module itself, within the cache context that the pipeline requested."""
        with self._sfumato_within():
            return target(self._sfumato_module, method)(*args, **kwargs)

    @property
    def _sfumato_apart(self) -> str:
        """Why its calls must not be batched with other requests; empty if they may be."""
        if self._sfumato_stateful:
            return "a cache inside the module keeps a state per request"
        return "it works in tiles for this request" if self._sfumato_tiled else ""

    @property
    def _sfumato_tiled(self) -> bool:
        shared: View = self._sfumato_view
        name: str = self._sfumato_name
        return shared.tiled and name.rpartition(".")[2] == tiling.NAME

    def _sfumato_within(self) -> AbstractContextManager[Any]:
        if self._sfumato_tiled:
            return tiling.tiled(self._sfumato_module)
        if self._sfumato_context is None or not self._sfumato_stateful:
            return nullcontext()
        name, fields = self._sfumato_context
        return self._sfumato_module.cache_context(f"{name}{self._sfumato_suffix()}", **fields)  # type: ignore[no-any-return]

    def _sfumato_suffix(self) -> str:
        return f"@{self._sfumato_view.number}"

    def _sfumato_restore(self) -> None:
        place = self._sfumato_place
        object.__setattr__(self, "_sfumato_place", None)
        if place is not None:
            self._sfumato_module.to(**place)
        if self._sfumato_stateful == ():  # one state for all requests, also for the next one
            self._sfumato_module._reset_stateful_cache()
        for manager in self._sfumato_stateful or ():
            for name in [name for name in manager._state_cache if name.endswith(self._sfumato_suffix())]:
                del manager._state_cache[name]


def view(pipeline: Any, *, foreign: bool = False, tiled: bool = False) -> Any:
    """A copy of `pipeline` for one request, of the same class, sharing the weights but no state that a call changes.

    `foreign`: the pipeline comes from a library user, so look for patched modules. `tiled`: its VAE works in
    tiles, for this request only.
    """
    reason = exclusive(pipeline) or (foreign and _patched(pipeline)) or ""
    return _view(pipeline, View(reason, tiled=tiled), {}, "")


def close(pipeline: Any) -> list[str]:
    """Close the view `pipeline` and the views inside it; returns what could not be restored."""
    shared = {stand_in._sfumato_view for stand_in in _stand_ins(pipeline)}
    for each in shared:
        each.close()
    return [what for each in shared for what in each.left]


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


def exclusive(pipeline: Any) -> str:
    """Why this pipeline runs from start to end without switching; empty for most."""
    for each in (pipeline, *(value for value in vars(pipeline).values() if isinstance(value, DiffusionPipeline))):
        if getattr(each, "free_init_enabled", False):
            return "FreeInit runs the whole schedule several times over one state"
        kind: Any = type(each)
        if word := _intrusion(kind):
            return f"its code contains: {word}"
        for module in vars(each).values():
            if isinstance(module, torch.nn.Module) and feature_caches.state_managers(module) == ():
                return "a cache inside a module keeps one state for all requests"
    return ""


def _patched(pipeline: Any) -> str:
    """Which module has a replaced `forward`, as third-party feature caches do to keep a state."""
    for name, module in vars(pipeline).items():
        hooked = ("_hf_hook", "_old_forward", "_diffusers_hook")  # accelerate's and diffusers' own
        if isinstance(module, torch.nn.Module) and "forward" in vars(module) and not vars(module).keys() & set(hooked):
            return f"the forward of {name} was replaced by something that may keep a state"
    return ""


@functools.cache
def _intrusion(kind: Any) -> str:
    for base in kind.__mro__:
        # The base class of all pipelines has such methods, for users to call.
        if base.__module__.startswith(("diffusers.pipelines.pipeline_utils", "diffusers.loaders", "builtins")):
            continue
        if not issubclass(base, DiffusionPipeline) and not base.__module__.startswith("diffusers.pipelines."):
            continue
        try:
            code = inspect.getsource(base)
        except (OSError, TypeError):
            return "its source cannot be read"
        if found := INTRUSIVE.search(code):
            return found[0]
    return ""


def _view(pipeline: Any, shared: View, done: dict[int, Any], prefix: str) -> Any:
    made = pipeline.__class__.__new__(pipeline.__class__)
    done[id(pipeline)] = made
    for name, value in vars(pipeline).items():
        made.__dict__[name] = _viewed(value, shared, done, f"{prefix}{name}", pipeline, made)
    # It resets the caches and offload hooks of all requests, which one request must not do.
    made.__dict__["maybe_free_model_hooks"] = _bound(_free_outside, made)
    return made


def _free_outside(pipeline: Any) -> None:
    if not _asker():
        type(pipeline).maybe_free_model_hooks(pipeline)


def _viewed(value: Any, shared: View, done: dict[int, Any], name: str, pipeline: Any, made: Any) -> Any:
    if id(value) in done:
        return done[id(value)]
    if type(value) is StandIn:
        value = value._sfumato_module
    if isinstance(value, DiffusionPipeline):
        return _view(value, shared, done, f"{name}.")
    if isinstance(value, torch.nn.Module):
        return shared.stand_in(value, name)
    if hasattr(value, "set_timesteps") or type(value).__module__.startswith("diffusers.guiders"):
        return done.setdefault(id(value), copy.deepcopy(value))
    if isinstance(value, MethodType) and value.__self__ is pipeline:
        return _bound(value.__func__, made)
    return value


def _bound(function: Callable[..., Any], made: Any) -> Callable[..., Any]:
    """Like a bound method of `made`, stored on it: a real one would be a reference cycle that keeps a run's memory."""
    method, view = MethodType(function, made), weakref.ref(made)

    def bound(*args: Any, **kwargs: Any) -> Any:
        return function(view(), *args, **kwargs)

    bound.__name__, bound.__doc__ = function.__name__, function.__doc__
    bound.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    return bound


def _asker() -> Asker | None:
    current = greenlet.getcurrent()
    return current if isinstance(current, Asker) else None


def _ask(stand_in: StandIn, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    asker = _asker()
    if asker is None:
        return stand_in._sfumato_compute(method, args, kwargs)
    return asker.ask(stand_in, method, args, kwargs)


def _asking(stand_in: StandIn, method: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)  # pipelines inspect its signature
    def asking(*args: Any, **kwargs: Any) -> Any:
        return _ask(stand_in, method, args, kwargs)

    return asking


def _only_reads(frame: FrameType) -> bool:
    return (frame.f_globals.get("__name__"), frame.f_code.co_name) in READERS


def _note_change(stand_in: StandIn, what: str) -> None:
    view = stand_in._sfumato_view
    feature_caches.forget(stand_in._sfumato_module)
    view.changed[id(stand_in._sfumato_module)] = f"{stand_in._sfumato_name}: {what}"


def _changing(stand_in: StandIn, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def changing(*args: Any, **kwargs: Any) -> Any:
        idle = name == "eval" and not stand_in._sfumato_module.training
        if not idle:
            _note_change(stand_in, name)
        result = real(*args, **kwargs)
        return stand_in if result is stand_in._sfumato_module else result

    return changing


def _to(stand_in: StandIn, *args: Any, **kwargs: Any) -> StandIn:
    """`module.to`: counts as a change until the module is back on its device and dtype."""
    module = stand_in._sfumato_module
    before = _place(module)
    module.to(*args, **kwargs)
    after = _place(module)
    if before != after and stand_in._sfumato_place is None:
        object.__setattr__(stand_in, "_sfumato_place", before)
        _note_change(stand_in, "to")
    elif stand_in._sfumato_place == after:
        object.__setattr__(stand_in, "_sfumato_place", None)
        stand_in._sfumato_view.changed.pop(id(module), None)
    return stand_in


def _place(module: Any) -> dict[str, Any]:
    parameter = next(module.parameters(), None)
    return {} if parameter is None else {"device": parameter.device, "dtype": parameter.dtype}


@contextmanager
def _cache_context(stand_in: StandIn, name: str, **fields: Any) -> Iterator[None]:
    # Recorded, not entered: other requests use the module in between.
    object.__setattr__(stand_in, "_sfumato_context", (name, fields))
    try:
        yield
    finally:
        object.__setattr__(stand_in, "_sfumato_context", None)


def _put_processors(module: Any, processors: dict[str, Any]) -> None:
    if dict(module.attn_processors) != processors:
        module.set_attn_processor(processors)
