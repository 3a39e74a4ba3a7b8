"""The runner `compile`: the forward pass of one module by torch.compile; of its blocks, where diffusers names those.

What is compiled is a copy of the module's layers on the same tensors, so the module itself never changes. Compiling
takes minutes: it happens in the background, and requests that begin before it is done are computed by the module from
their first step to their last. Shapes are dynamic, apart from a single row, which torch treats as a kind of its own. A
call that would have to be compiled again is left to the module, too, and compiled for the requests that begin later.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from sfumato.batching import cpu_threads, outputs
from sfumato.batching.calls import target
from sfumato.batching.module_runner import numbers
from sfumato.batching.outcomes import is_out_of_memory
from sfumato.core import EAGER
from sfumato.errors import told
from sfumato.runners import arguments as call_arguments
from sfumato.runners import module_state
from sfumato.runners.arguments import Arguments, Unserved
from sfumato.runners.background import Background
from sfumato.status import RunnerState

log = logging.getLogger(__name__)

NAME = "compile"

METHODS = {"__call__": "__call__", "forward": "__call__", "decode": "decode"}

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Allowed difference from the module at the first call of a size, relative to the output's largest value."""

MAX_KINDS = 4
"""Kinds of calls of one module that are compiled."""

LIMITS: dict[str, Any] = {"recompile_limit": 256, "accumulated_recompile_limit": 4096}
"""torch's own would end compiling after eight variants of a class's code, of all models together."""


NO_COMPILER = "torch.compile needs a C++ compiler: install g++, or name one in CXX"


def compiler() -> str:
    """The C++ compiler that torch would call; empty if there is none."""
    return shutil.which(os.environ.get("CXX", "g++")) or ""


def why_not(module: torch.nn.Module) -> str:
    """Why a module cannot be compiled here; empty if it can."""
    on_cpu = all(tensor.device.type == "cpu" for tensor in module.parameters())
    if on_cpu and not compiler():
        return NO_COMPILER
    return module_state.why_hooked(module)


class _Refused(Exception):
    """Raised in place of compiling while a request waits."""


class Compiled:
    """The runner of one module. Used on one thread, apart from what `Background` does for it."""

    bytes = 0
    """Compiled code is small, and the copy has the module's own tensors."""
    folders: tuple[Path, ...] = ()

    def __init__(self, module: torch.nn.Module, threads: int, background: Background) -> None:
        self.number = next(numbers)
        self._module = weakref.ref(module)
        self._threads = threads
        self._background = background
        self.why_eager = why_not(module)
        self._state = None if self.why_eager else module_state.state_of(module)
        self._dtype = module_state.dtype_of(module)
        self._twin: Any = None
        self._allowed = threading.local()
        """Whether this thread may compile."""
        self._asked: set[tuple[Any, ...]] = set()
        self._ready: frozenset[tuple[Any, ...]] = frozenset()
        """Kinds of calls that are compiled."""
        self._settled: set[tuple[Any, ...]] = set()
        """Those, and others that cannot be."""
        self._version = 0
        """How often something has become ready."""
        self._now = _Now(self, self._ready, self._version)
        self.sizes: dict[str, bool] = {}
        """Shapes of the arguments → whether its output and the module's agree there."""
        self.compilations = 0
        self.out_of_memory = False

    @property
    def busy(self) -> bool:
        """Whether something is being compiled: torch's lock would keep a call waiting that has to be, too."""
        return self._background.busy

    @property
    def name(self) -> str:
        """As recipes have it."""
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        return f"{NAME}-{short.get(self._dtype, 'other')}"

    def for_request(self) -> _Now | None:
        module = self._module()
        same = not self.why_eager and module is not None and module_state.state_of(module) == self._state
        if same and self._now.version != self._version:
            self._now = _Now(self, self._ready, self._version)
        return self._now if same else None

    def state(self, module: str) -> RunnerState:
        if self.why_eager or not self.for_request():
            return RunnerState(module, EAGER, self.why_eager or "it has changed since it was compiled")
        refused = sum(not same for same in self.sizes.values())
        told = [f"{refused} sizes are computed without it"] if refused else []
        if self._asked - self._settled:
            told.append("it is being compiled; until then the module computes")
        if not self._ready:
            return RunnerState(module, EAGER, "; ".join(told) or "it is compiled after the first picture has begun")
        return RunnerState(module, self.name, "; ".join(told))

    # For `auto`, which waits for it when nobody else does.

    def prepare(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, wait: bool = False) -> bool:
        kind = self.want(method, args, kwargs, wait=wait)
        return kind is None or kind in self._settled

    def serves(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        now = self.for_request()
        return now is not None and now.serves(method, args, kwargs)

    def run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str]:
        now = _Now(self, self._ready, self._version)  # not a request's, which may have left this size to the module
        return now.run(method, args, kwargs) if self.for_request() else now.by_module(method, args, kwargs)

    # For requests.

    def kind(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Arguments]:
        """What is compiled together, and the arguments. Raises Unserved."""
        module = self._module()
        if module is None or method not in METHODS or self.why_eager:
            raise Unserved("it is not compiled")
        read = call_arguments.read(module, args, kwargs, METHODS[method], anywhere=True)
        single = tuple(1 in shape[:1] for shape in read.shapes)
        return (METHODS[method], read.structure, single, read.return_dict), read

    def want(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, wait: bool = False, again: str = ""
    ) -> tuple[Any, ...] | None:
        """Compile for such calls, in the background unless `wait`. `again`: a size that it does not serve yet."""
        try:
            kind, _ = self.kind(method, args, kwargs)
        except Unserved:
            return None
        key = (*kind, again)
        if key not in self._asked and len(self._asked) < MAX_KINDS:
            self._asked.add(key)
            args, kwargs = call_arguments.kept((args, kwargs))
            work = functools.partial(self._compile, key, kind, METHODS[method], args, kwargs)
            work() if wait else self._background.submit(work)
        return kind if (*kind, "") in self._asked else None

    def compute(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], size: str) -> tuple[Any, str] | None:
        """None: it would have to be compiled, or it failed. At the first call of a size the module computes as well."""
        module = self._module()
        try:
            output = target(self._twin, METHODS[method])(*args, **kwargs)
        except Exception as error:  # whatever torch raises, the module can compute it
            if is_out_of_memory(error):
                raise  # the batcher makes room and tries again
            if not getattr(self._allowed, "refused", False):
                self.why_eager = f"compiled code failed: {told(error)}"
                log.warning(
                    "%s is computed by the module itself from now on: %s", type(module).__name__, self.why_eager
                )
            self._allowed.refused = False
            return None
        if size not in self.sizes:
            own = target(module, method)(*args, **kwargs)
            self.sizes[size] = outputs.difference(output, own) <= TOLERANCE.get(self._dtype, 1e-3)
            output = output if self.sizes[size] else own
        return (output, self.name) if self.sizes[size] else (output, EAGER)

    # In the background.

    def _compile(
        self, key: tuple[Any, ...], kind: tuple[Any, ...], method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        module = self._module()
        if module is None:
            return
        try:
            log.info("%s is compiled", type(module).__name__)
            with _settings(), torch.no_grad(), cpu_threads.using(self._threads):
                self._twin = self._twin or self._made(module, method)
                self._allowed.compiles = True
                target(self._twin, method)(*args, **kwargs)
        except Exception as error:  # whatever is raised by compiling code that others wrote
            self.out_of_memory = is_out_of_memory(error)
            if not self._ready and not self.out_of_memory:
                self.why_eager = f"it cannot be compiled: {told(error)}"
            log.warning("%s cannot be compiled: %r", type(module).__name__, error)
        else:
            self._ready = frozenset({*self._ready, kind})
            self._version += 1
            log.info("%s is compiled for such calls from the next request on", type(module).__name__)
        finally:
            self._allowed.compiles = False
            self._settled |= {key, kind}

    def _made(self, module: torch.nn.Module, method: str) -> Any:
        """The copy that is compiled at its first call."""
        twin: Any = module_state.copied(module)
        options: dict[str, Any] = {"dynamic": True, "backend": self._backend}
        if method != "__call__":
            setattr(twin, method, torch.compile(getattr(twin, method), **options))
        elif getattr(twin, "_repeated_blocks", None):
            twin.compile_repeated_blocks(**options)
        else:
            twin.compile(**options)
        return twin

    def _backend(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        if not getattr(self._allowed, "compiles", False):
            self._allowed.refused = True
            raise _Refused
        self.compilations += 1
        return _built(graph, inputs)


class _Now:
    """What is compiled when a request begins, and stays so for it."""

    def __init__(self, compiled: Compiled, kinds: frozenset[tuple[Any, ...]], version: int) -> None:
        self.number = next(numbers)
        self.kinds = kinds
        self.version = version
        self._compiled = weakref.ref(compiled)
        self._module = compiled._module
        self._unready: set[str] = set()
        """Sizes that need another compilation, or may need one while torch is busy with another."""

    def prepare(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, wait: bool = False) -> bool:
        if compiled := self._compiled():
            compiled.want(method, args, kwargs)  # whoever waits would gain nothing from it
        return True

    def serves(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return self._served(method, args, kwargs) is not None

    def run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str]:
        compiled, size = self._compiled(), self._served(method, args, kwargs)
        if compiled and size is not None:
            if computed := compiled.compute(method, args, kwargs, size):
                return computed
            self._unready.add(size)
            compiled.want(method, args, kwargs, again=size)
        return self.by_module(method, args, kwargs)

    def _served(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """The size of such a call, if compiled code computes it. It may be gone: the model has another runner."""
        compiled = self._compiled()
        if compiled is None:
            return None
        try:
            kind, read = compiled.kind(method, args, kwargs)
        except Unserved:
            return None
        size = " ".join("x".join(map(str, shape)) for shape in read.shapes)
        if size not in compiled.sizes and compiled.busy:
            self._unready.add(size)
        served = kind in self.kinds and size not in self._unready and compiled.sizes.get(size, True)
        return size if served else None

    def by_module(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str]:
        return target(self._module(), method)(*args, **kwargs), EAGER


def _built(graph: Any, inputs: Any) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx  # with it comes much that nothing else needs

    compiled: Any = compile_fx(graph, inputs)
    return compiled  # type: ignore[no-any-return]


def _settings() -> ExitStack:
    """torch's settings while something is compiled: sizes that happen to be equal are not taken for the same."""
    import torch._dynamo.config
    import torch._inductor.config
    import torch.fx.experimental._config

    stack = ExitStack()
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")  # torch warns of parts of itself
    stack.enter_context(torch._dynamo.config.patch(**LIMITS))
    shapes: Any = torch.fx.experimental._config
    stack.enter_context(shapes.patch(use_duck_shape=False))
    stack.enter_context(torch._inductor.config.patch(compile_threads=1))  # no pool of processes that outlives us
    return stack
