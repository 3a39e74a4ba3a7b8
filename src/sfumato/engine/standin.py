"""A view of a pipeline for one request, in which stand-ins take the place of the heavy modules.

A view is a shallow copy: tokenizers, processors and modules are shared, schedulers and guiders are copied,
and each module is replaced by an object that looks like it, has all its attributes and its class, and turns
a call into a question to whoever runs the request. The modules themselves are never touched, so the
pipeline can be used plainly beside its views. Outside a request a stand-in calls straight through.

Some things a request does forbid switching to another one while they last (`View.occupied`): changing a
shared module, or scaling its adapters. Some pipelines do that all the time; their views never switch.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

import greenlet  # type: ignore[import-untyped]
import torch
from diffusers import DiffusionPipeline

from sfumato.engine.calls import target

METHODS = frozenset({"forward", "encode", "decode", "get_text_features", "get_image_features"})
"""What a stand-in intercepts besides being called."""

MUTATORS = re.compile(
    r"(to|cuda|cpu|half|float|bfloat16|double|type|to_empty|train|eval|requires_grad_|apply|load_\w+|register_\w+"
    r"|(enable|disable)_\w+|set_\w+|(un)?fuse_\w+|add_\w*adapter\w*|delete_adapters?|compile|resize_\w+)$"
)
"""Names of methods that change a module for everybody."""

GETTERS = frozenset({"add_embedding", "add_time_proj", "register_buffer_names", "set_extra_state"})
"""Names that look like `MUTATORS` and change nothing."""

INTRUSIVE = re.compile(
    r"set_attn_processor\(|\.processor = |enable_grad\(|autograd\.grad|\.(named_)?modules\(\)|requires_grad_\(True"
)
"""Code of pipelines that rewire shared modules during a call or compute gradients: PAG, LEdits, SAG, GLIGEN,
Attend-and-Excite, DiffEdit, zero-shot video. A batch with another request would be computed with their wiring."""

numbers = itertools.count(1)


class Asker(greenlet.greenlet):  # type: ignore[misc]
    """The greenlet of a request: stand-ins that are called inside ask it for the answer."""

    def ask(self, stand_in: StandIn, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class View:
    """What the stand-ins of one view share."""

    def __init__(self, exclusive: str) -> None:
        self.exclusive = exclusive
        """Why the whole pipeline runs without a switch; empty where it need not."""
        self.number = next(numbers)
        self.stand_ins: dict[int, StandIn] = {}
        self.changed: dict[int, str] = {}
        """Modules that this request has changed → by what."""
        self._tuned: list[tuple[list[Any], Any]] = []
        self._processors: list[tuple[Any, Any]] = []

    def stand_in(self, module: Any, name: str) -> StandIn:
        made = self.stand_ins.get(id(module))
        if made is None:
            made = self.stand_ins[id(module)] = StandIn(module, name, self)
            layers = _adapter_layers(module)
            if layers:
                self._tuned.append((layers, _adapters(layers)))
            if self.exclusive and hasattr(module, "attn_processors"):
                self._processors.append((module, dict(module.attn_processors)))
        return made

    def occupied(self) -> str:
        """Why this request must not switch now; empty when it may."""
        if self.exclusive or self.changed:
            return self.exclusive or next(iter(self.changed.values()))
        for layers, found in self._tuned:
            if _adapters(layers) != found:
                return "adapters are scaled for this request"
        return ""

    def close(self) -> None:
        """At the end of a request: put back what its pipeline left changed, forget what caches hold for it."""
        for module, processors in self._processors:
            if dict(module.attn_processors) != processors:
                module.set_attn_processor(processors)
        for stand_in in self.stand_ins.values():
            stand_in._sfumato_restore()
        self.changed.clear()


class StandIn:
    """Looks like `module`, is not it: calls become questions, everything else goes through."""

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
        put("_sfumato_stateful", _state_managers(module))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._sfumato_module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _ask(self, "__call__", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._sfumato_module, name)
        if name in METHODS:
            return _asking(self, name, value)
        if name == "cache_context" and callable(value):
            return functools.partial(_cache_context, self)
        if name == "to":
            return functools.partial(_to, self)
        if callable(value) and MUTATORS.match(name) and name not in GETTERS and not isinstance(value, torch.nn.Module):
            return _changing(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        _note_change(self, f"sets {name}")
        setattr(self._sfumato_module, name, value)

    def __repr__(self) -> str:
        return f"<stand-in for {self._sfumato_module!r}>"

    def _sfumato_compute(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """On the module itself, within the cache context that the pipeline asked for."""
        with self._sfumato_within():
            return target(self._sfumato_module, method)(*args, **kwargs)

    def _sfumato_within(self) -> AbstractContextManager[Any]:
        if self._sfumato_context is None or not self._sfumato_stateful:
            return nullcontext()
        name, fields = self._sfumato_context
        return self._sfumato_module.cache_context(f"{name}{self._sfumato_suffix()}", **fields)  # type: ignore[no-any-return]

    def _sfumato_suffix(self) -> str:
        return f"@{self._sfumato_view.number}"

    def _sfumato_restore(self) -> None:
        if self._sfumato_place is not None:
            self._sfumato_module.to(**self._sfumato_place)
            object.__setattr__(self, "_sfumato_place", None)
        if self._sfumato_stateful == ():  # one state for all, and so for the next one too
            self._sfumato_module._reset_stateful_cache()
        for manager in self._sfumato_stateful or ():
            for name in [name for name in manager._state_cache if name.endswith(self._sfumato_suffix())]:
                del manager._state_cache[name]


def view(pipeline: Any, *, foreign: bool = False) -> Any:
    """A copy of `pipeline` for one request, of the same class, that shares the weights and nothing a call changes.

    `foreign`: others had their hands on it, so look for modules that they have patched.
    """
    reason = exclusive(pipeline) or (foreign and _patched(pipeline)) or ""
    return _view(pipeline, View(reason), {}, "")


def exclusive(pipeline: Any) -> str:
    """Why this pipeline runs from start to end without a switch; empty for most."""
    for each in (pipeline, *(value for value in vars(pipeline).values() if isinstance(value, DiffusionPipeline))):
        if getattr(each, "free_init_enabled", False):
            return "FreeInit runs the whole schedule several times over one state"
        kind: Any = type(each)
        if word := _intrusion(kind):
            return f"its code has: {word}"
        for module in vars(each).values():
            if isinstance(module, torch.nn.Module) and _state_managers(module) == ():
                return "a cache inside a module keeps one state for all requests"
    return ""


def _patched(pipeline: Any) -> str:
    """Which module has a `forward` put over its own, as feature caches of third parties do to keep a state."""
    for name, module in vars(pipeline).items():
        hooked = ("_hf_hook", "_old_forward", "_diffusers_hook")  # accelerate's and diffusers' own
        if isinstance(module, torch.nn.Module) and "forward" in vars(module) and not vars(module).keys() & set(hooked):
            return f"the forward of {name} was replaced by something that may keep a state"
    return ""


@functools.cache
def _intrusion(kind: Any) -> str:
    for base in kind.__mro__:
        # What all pipelines inherit has such methods, for others to call.
        if base.__module__.startswith(("diffusers.pipelines.pipeline_utils", "diffusers.loaders", "builtins")):
            continue
        if not issubclass(base, DiffusionPipeline) and not base.__module__.startswith("diffusers.pipelines."):
            continue
        try:
            code = inspect.getsource(base)
        except (OSError, TypeError):
            return "no source to be read"
        if found := INTRUSIVE.search(code):
            return found[0]
    return ""


def _view(pipeline: Any, shared: View, done: dict[int, Any], prefix: str) -> Any:
    made = pipeline.__class__.__new__(pipeline.__class__)
    done[id(pipeline)] = made
    for name, value in vars(pipeline).items():
        made.__dict__[name] = _viewed(value, shared, done, f"{prefix}{name}", pipeline, made)
    freeing = made.maybe_free_model_hooks
    # It resets the caches and offload hooks of everybody. Inside a request that is not this pipeline's to decide.
    made.__dict__["maybe_free_model_hooks"] = lambda: None if _asker() else freeing()
    return made


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
        return MethodType(value.__func__, made)
    return value


def _asker() -> Asker | None:
    current = greenlet.getcurrent()
    return current if isinstance(current, Asker) else None


def _ask(stand_in: StandIn, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    asker = _asker()
    if asker is None:
        return stand_in._sfumato_compute(method, args, kwargs)
    return asker.ask(stand_in, method, args, kwargs)


def _asking(stand_in: StandIn, method: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)  # pipelines read its signature to learn what it takes
    def asking(*args: Any, **kwargs: Any) -> Any:
        return _ask(stand_in, method, args, kwargs)

    return asking


def _note_change(stand_in: StandIn, what: str) -> None:
    view = stand_in._sfumato_view
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
    """`module.to`: a change for as long as the module is not back where it was."""
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


def _state_managers(module: Any) -> tuple[Any, ...] | None:
    """What keeps states per cache context in `module`: None without a cache, empty if it knows no contexts."""
    if not hasattr(module, "cache_context"):
        return None
    found: list[Any] = []
    stateful = [
        hook
        for part in module.modules()
        if "_diffusers_hook" in vars(part)
        for hook in part._diffusers_hook.hooks.values()
        if hook._is_stateful
    ]
    for hook in stateful:
        managers = [value for value in vars(hook).values() if type(value).__name__ == "StateManager"]
        if not managers:
            return ()
        found += managers
    return tuple({id(manager): manager for manager in found}.values()) if stateful else None


def _adapter_layers(module: Any) -> list[Any]:
    if not getattr(module, "peft_config", None):
        return []
    return [part for part in module.modules() if hasattr(part, "active_adapters") and hasattr(part, "scaling")]


def _adapters(layers: list[Any]) -> list[Any]:
    return [(tuple(layer.active_adapters), layer.disable_adapters, dict(layer.scaling)) for layer in layers]
