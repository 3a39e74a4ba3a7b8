"""A quicker start: skip or defer what diffusers and transformers import but drawing does not use.

    torch._dynamo                   a worker compiles nothing
    torch.distributed               a worker is a single process
    scipy.stats, scipy.integrate    used only by beta schedules and LMS
    scipy in transformers           training losses of detectors
    packages of `LATER`             each of their `__init__` imports every existing model

All of it stays usable: on first use a module is imported with its dependencies.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

LATER = frozenset(f"diffusers.{name}" for name in (
    "hooks", "models.autoencoders", "models.controlnets", "models.transformers", "models.unets",
))  # fmt: skip
"""Packages whose names are imported on first use."""


def _as_it_is(fn: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    return fn or (lambda fn: fn)


WAITING: Mapping[str, Mapping[str, Any]] = {
    "torch._dynamo": {
        **dict.fromkeys(("allow_in_graph", "assume_constant_result", "disable"), _as_it_is),
        "eval_frame": SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {})),
    },
    "scipy.stats": {},
    "scipy.integrate": {},
}
"""Modules that are executed when a submodule, or a name that is not listed here, is first used."""

APART = frozenset({"torch._dynamo._trace_wrapped_higher_order_op"})
"""Submodules that work without their parent. transformers imports this one for its masks."""


def lean() -> None:
    """Call it once, before diffusers and transformers are imported. Only for processes that draw."""
    if "diffusers" in sys.modules:
        return
    import torch

    torch.distributed.is_available = lambda: False
    sys.meta_path.insert(0, _Finder())
    from transformers import utils

    known = utils.is_scipy_available
    utils.is_scipy_available = lambda: False
    try:
        importlib.import_module("transformers.loss.loss_utils")
    finally:
        utils.is_scipy_available = known


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        above = sys.modules.get(name.rpartition(".")[0])
        if type(above) is _Waiting and name not in APART:
            # Their submodules import each other in a circle, which only works when entered at the top.
            above.run()
            if known := sys.modules.get(name):
                spec = ModuleSpec(name, _Known(known))
                vars(known)["__spec__"] = spec  # the import system continues with it; torch's configs refuse assignment
                return spec
        if name not in LATER and name not in WAITING:
            return None
        found = PathFinder.find_spec(name, path)
        if found and isinstance(found.loader, SourceLoader):
            found.loader = _Names(found.loader) if name in LATER else _Whole(found.loader, WAITING[name])
        return found


class _Names(Loader):
    """A package whose `__init__` only collects names of its modules: each is looked up on first use."""

    def __init__(self, loader: SourceLoader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        package = module.__name__
        source = self._loader.get_source(package) or ""
        imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level == 1]
        places = {alias.asname or alias.name: (node.module, alias.name) for node in imports for alias in node.names}
        parts = {node.module for node in imports}

        def find(name: str) -> Any:
            if name in places:
                where, what = places[name]
                value = getattr(importlib.import_module(f"{package}.{where}"), what)
                setattr(module, name, value)
                return value
            if name in parts:
                return importlib.import_module(f"{package}.{name}")
            raise AttributeError(f"module {package!r} has no attribute {name!r}")

        vars(module).update(__getattr__=find, __all__=sorted(places), __dir__=lambda: sorted({*vars(module), *places}))


class _Whole(Loader):
    """A module that is executed when a name other than `known` is first used."""

    def __init__(self, loader: SourceLoader, known: Mapping[str, Any]) -> None:
        self._loader = loader
        self._known = known

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Waiting(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self._known)


class _Waiting(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or type(self) is not _Waiting:  # the import system looks at these
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.run()
        return getattr(self, name)

    def run(self) -> None:
        spec = self.__spec__
        assert spec and isinstance(spec.loader, _Whole)
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec.loader = spec.loader._loader
        spec.loader.exec_module(self)


class _Known(Loader):
    """A module that its parent has already imported."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__spec__"] = self._spec
