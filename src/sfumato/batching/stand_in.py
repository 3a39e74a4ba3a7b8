"""A stand-in takes the place of a heavy module in the view of one request.

It has the module's attributes and class. Calls go to the request (`CallHandler`), which parks or computes
them; everything else goes to the module, and the view records what would change the module for other requests.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Any

import greenlet  # type: ignore[import-untyped]
import torch

from sfumato.batching import feature_caches, interruption
from sfumato.batching.adapted import Selection
from sfumato.batching.calls import describe, target
from sfumato.batching.guidance import Interval
from sfumato.batching.interruption import BeforePart
from sfumato.batching.module_runner import ModuleRunner
from sfumato.core import EAGER
from sfumato.pipelines import compat, tiling

if TYPE_CHECKING:
    from sfumato.batching.views import View

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
    ("diffusers.modular_pipelines.modular_pipeline", "_execution_device"),
    ("diffusers.hooks.group_offloading", "_get_top_level_group_offload_hook"),
    ("diffusers.hooks.group_offloading", "_is_group_offload_enabled"),
})  # fmt: skip
"""Functions, by module and name, that iterate over all submodules in each request but change none."""


class CallHandler(greenlet.greenlet):  # type: ignore[misc]
    """The greenlet of a request: stand-ins called inside it pass their calls to it."""

    def handle_call(self, stand_in: StandIn, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class StandIn:
    """Proxy for `module`: calls go to the batcher, everything else to the module."""

    __slots__ = (
        "__weakref__",
        "_sfumato_context",
        "_sfumato_module",
        "_sfumato_name",
        "_sfumato_place",
        "_sfumato_runner",
        "_sfumato_selection",
        "_sfumato_stateful",
        "_sfumato_view",
    )

    def __init__(
        self,
        module: Any,
        name: str,
        view: View,
        selection: Selection | None = None,
        runner: ModuleRunner | None = None,
    ) -> None:
        """`selection`: the adapters that act, if any are loaded for `module`. `runner`: what computes it instead."""
        put = functools.partial(object.__setattr__, self)
        put("_sfumato_module", module)
        put("_sfumato_name", name)
        put("_sfumato_view", view)
        put("_sfumato_context", None)
        put("_sfumato_place", None)
        put("_sfumato_selection", selection)
        put("_sfumato_runner", runner)
        put("_sfumato_stateful", feature_caches.state_managers(module))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._sfumato_module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _handle_call(self, "__call__", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            value = getattr(self._sfumato_module, name)
        except AttributeError:
            if compat.is_itself(self._sfumato_module, name):
                return self
            raise
        if isinstance(value, torch.nn.Module):
            self._sfumato_view.track(self, value)
            return value
        if name in PARTS and not _only_reads(sys._getframe(1)):
            self._sfumato_view.track(self, self._sfumato_module)
        if name in METHODS:
            return _intercepted(self, name, value)
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

    def _sfumato_compute(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], before_part: BeforePart | None = None
    ) -> Any:
        """Call the module itself, within the cache context that the pipeline requested. `before_part`: if it is long"""
        if self._sfumato_stateful:
            feature_caches.prepare(self._sfumato_module, self._sfumato_view.steps())
        with self._sfumato_within():
            selection: Selection | None = self._sfumato_selection
            if selection and not selection.plain:
                return selection.run(method, [selection], args, kwargs)
            module = tiling.tiled(self._sfumato_module) if self._sfumato_tiled else self._sfumato_module
            if before_part is None or self._sfumato_stateful or not interruption.interruptible(module, method):
                return target(module, method)(*args, **kwargs)
            with interruption.part_by_part(module, before_part) as own:
                return target(own, method)(*args, **kwargs)

    def _sfumato_run(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], before_part: BeforePart | None = None
    ) -> tuple[Any, str]:
        """As `_sfumato_compute`, by the runner if there is one, and its name: of the module without one it is empty."""
        runner: ModuleRunner | None = self._sfumato_runner
        if runner is None or not runner.serves(method, args, kwargs):
            value, by = self._sfumato_compute(method, args, kwargs, before_part), EAGER if runner else ""
        else:
            value, by = runner.run(method, args, kwargs)
        self._sfumato_computed(by)
        return value, by

    def _sfumato_computed(self, by: str = "") -> None:
        """Note what has computed a call: a runner, or the module itself."""
        self._sfumato_view.note(self._sfumato_name, by or EAGER)

    def _sfumato_without_runner(self) -> None:
        object.__setattr__(self, "_sfumato_runner", None)

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


def current() -> CallHandler | None:
    current = greenlet.getcurrent()
    return current if isinstance(current, CallHandler) else None


def _handle_call(stand_in: StandIn, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    handle = functools.partial(_pass_on, stand_in, method)
    interval: Interval | None = stand_in._sfumato_view.interval
    if interval is None or not interval.may_leave_out(stand_in._sfumato_name):
        return handle(args, kwargs)
    return interval.computed(describe(stand_in._sfumato_module, method, args, kwargs, interval.fingerprints), handle)


def _pass_on(stand_in: StandIn, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    handler = current()
    if handler is None:
        if stand_in._sfumato_runner is not None:
            stand_in._sfumato_runner.prepare(method, args, kwargs, wait=True)
        return stand_in._sfumato_run(method, args, kwargs)[0]
    return handler.handle_call(stand_in, method, args, kwargs)


def _intercepted(stand_in: StandIn, method: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)  # pipelines inspect its signature
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        return _handle_call(stand_in, method, args, kwargs)

    return intercepted


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
