"""A quicker start: skip or defer what diffusers and transformers import but drawing does not use.

    torch._dynamo                   a worker compiles nothing, unless `accelerate: compile` asks for it
    torch.distributed               a worker is a single process, unless it has several devices
    scipy.stats, scipy.integrate    used only by beta schedules and LMS
    scipy.optimize                  training losses of detectors
    torchao                         used by quantised models only
    packages of `LAZY_PACKAGES`     each of their `__init__` imports every existing model

All of it stays usable: on first use a module is imported with its dependencies.

This replaces something in another package: `torch.distributed.is_available`, by which diffusers,
accelerate and transformers decide what to import. There is no public switch for it, and without it a worker imports 190
more modules, a third of its start after torch. It is replaced in workers only, never where Sfumato is a library
(`gather`). The other modules are handled with Python's own import hook.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

from sfumato.pipelines import syntax

LAZY_PACKAGES = frozenset(f"diffusers.{name}" for name in (
    "hooks", "models.autoencoders", "models.controlnets", "models.transformers", "models.unets",
))  # fmt: skip
"""Packages whose names are imported on first use."""


def _unchanged(fn: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    return fn or (lambda fn: fn)


def _later(module: str, name: str) -> Callable[..., Any]:
    """What stands in for a callable: its module is imported when it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        imported: Any = importlib.import_module(module)
        if type(imported) is _DeferredModule:
            imported.run()
        return getattr(imported, name)(*args, **kwargs)

    return call


DEFERRED: Mapping[str, Mapping[str, Any]] = {
    "torch._dynamo": {
        **dict.fromkeys(("allow_in_graph", "assume_constant_result", "disable"), _unchanged),
        "eval_frame": SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {})),
    },
    "scipy.stats": {},
    "scipy.integrate": {},
    "scipy.optimize": {"linear_sum_assignment": _later("scipy.optimize", "linear_sum_assignment")},
    **{
        module: {"TorchAoHfQuantizer": _later(module, "TorchAoHfQuantizer")}
        for module in ("diffusers.quantizers.torchao.torchao_quantizer", "transformers.quantizers.quantizer_torchao")
    },
}
"""Modules that are executed when a submodule, or a name that is not listed here, is first used."""

INDEPENDENT = frozenset({"torch._dynamo._trace_wrapped_higher_order_op"})
"""Submodules that work without their parent. transformers imports this one for its masks."""


def install(*, alone: bool = True) -> None:
    """Call it once, before diffusers and transformers are imported. Only for processes that draw.

    `alone`: False for a worker of several devices.
    """
    if "diffusers" in sys.modules:
        return
    import torch

    if alone:
        torch.distributed.is_available = lambda: False
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        parent = sys.modules.get(name.rpartition(".")[0])
        # Their submodules import each other in a circle, which only works when entered at the top. If another thread is
        # doing that it must not be waited for: it may wait for the submodule that is being imported here.
        executed = type(parent) is _DeferredModule and name not in INDEPENDENT and parent.run(0)
        if executed and (imported := sys.modules.get(name)):
            spec = ModuleSpec(name, _AlreadyImported(imported))
            vars(imported)["__spec__"] = spec  # import continues with it; torch's configs refuse assignment
            return spec
        if name not in LAZY_PACKAGES and name not in DEFERRED:
            return None
        found = PathFinder.find_spec(name, path)
        if found and isinstance(found.loader, SourceLoader):
            found.loader = (
                _LazyPackage(found.loader) if name in LAZY_PACKAGES else _Deferred(found.loader, DEFERRED[name])
            )
        return found


class _LazyPackage(Loader):
    """A package whose `__init__` only collects names of its modules: each is looked up on first use."""

    def __init__(self, loader: SourceLoader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        package = module.__name__
        source = self._loader.get_source(package) or ""
        imports = [
            node for node in ast.walk(syntax.parsed(source)) if isinstance(node, ast.ImportFrom) and node.level == 1
        ]
        origins = {alias.asname or alias.name: (node.module, alias.name) for node in imports for alias in node.names}
        submodules = {node.module for node in imports}

        def find(name: str) -> Any:
            if name in origins:
                submodule, attribute = origins[name]
                value = getattr(importlib.import_module(f"{package}.{submodule}"), attribute)
                setattr(module, name, value)
                return value
            if name in submodules:
                return importlib.import_module(f"{package}.{name}")
            raise AttributeError(f"module {package!r} has no attribute {name!r}")

        vars(module).update(
            __getattr__=find, __all__=sorted(origins), __dir__=lambda: sorted({*vars(module), *origins})
        )


class _Deferred(Loader):
    """A module that is executed when a name other than `stand_ins` is first used."""

    def __init__(self, loader: SourceLoader, stand_ins: Mapping[str, Any]) -> None:
        self._loader = loader
        self._stand_ins = stand_ins

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _DeferredModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self._stand_ins)


_LOCK = "_sfumato_lock"
PATIENCE_S = 60
"""How long a thread waits for another that executes the module; that one might wait for an import of this one."""


class _DeferredModule(ModuleType):
    """Executed by the thread that first uses it; others wait: models are loaded in threads while others draw."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and self.run():  # the import system looks at names with underscores
            return getattr(self, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def run(self, patience_s: float = PATIENCE_S) -> bool:
        """Whether it has been executed now; otherwise a thread, this one or another, is in the middle of that."""
        spec, lock = self.__spec__, vars(self).setdefault(_LOCK, threading.RLock())
        assert spec
        if not lock.acquire(timeout=patience_s):
            return False
        try:
            if type(self) is not _DeferredModule:
                return True
            if not isinstance(deferred := spec.loader, _Deferred):
                return False
            spec.loader = deferred._loader
            try:
                spec.loader.exec_module(self)
            except BaseException:
                spec.loader = deferred  # the next use tries again
                raise
            self.__class__ = ModuleType  # type: ignore[assignment]
            return True
        finally:
            lock.release()


class _AlreadyImported(Loader):
    """A module that its parent has already imported."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__spec__"] = self._spec
