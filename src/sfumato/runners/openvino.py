"""The runner `openvino`: the forward pass of one module by a graph that is converted from it.

A graph serves every size. It is made at the first call of a structure, while the request that makes it waits, so no
picture depends on when that was. At the first call of each size the module computes as well: if the two differ by
more than rounding, that size is the module's from then on, in this process and the next ones. So are calls that no
graph can serve, and all calls once a graph has failed.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import weakref
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from sfumato.batching import outputs
from sfumato.batching.calls import target
from sfumato.batching.module_runner import numbers
from sfumato.batching.outcomes import is_out_of_memory
from sfumato.core import EAGER
from sfumato.errors import told
from sfumato.pipelines import source_digest
from sfumato.runners import arguments as call_arguments
from sfumato.runners import graph, kept, module_state
from sfumato.runners.arguments import Arguments, Unserved
from sfumato.runners.background import Background
from sfumato.runners.graph import Form, Graph, Precision
from sfumato.status import RunnerState

log = logging.getLogger(__name__)

NAME = "openvino"

METHODS = {"__call__": "__call__", "forward": "__call__", "decode": "decode"}
"""What a graph can compute, and one name for it. A module has few others: `encode` returns a distribution."""

TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""Allowed difference between graph and module, relative to the output's largest value. A size that tracing took for a
constant gives far more."""

MAX_STRUCTURES = 2
"""Graphs of one module: each takes the memory of its weights."""

FORMAT = 2
"""Version of what is kept on disk."""


@dataclass(slots=True)
class _Structure:
    """A structure of calls, and its graph."""

    folder: Path | None = None
    graph: Graph | None = None
    form: Form | None = None
    refused: str = ""
    """Why the module computes these calls."""
    sizes: dict[str, bool] = field(default_factory=dict)
    """Shapes of the arguments → whether graph and module agree there."""
    failed: set[str] = field(default_factory=set)
    """Those of them where OpenVINO raised: they are tried again by the next process."""

    @property
    def settled(self) -> bool:
        return bool(self.refused) or self.graph is not None


class OpenVino:
    """The runner of one module. Used on one thread, apart from what `Background` does for it."""

    busy = False
    """What is being converted keeps no other graph waiting."""

    def __init__(self, module: torch.nn.Module, folder: Path, threads: int, background: Background) -> None:
        """`folder`: where graphs are kept."""
        self.number = next(numbers)
        self._module = weakref.ref(module)
        self._folder = folder
        self._threads = threads
        self._background = background
        self._kind = type(module).__name__
        self._structures: dict[tuple[str, str], _Structure] = {}
        self._has_others = False
        """Whether there were kinds of calls beyond those."""
        self._precision: Precision | None = None
        self.why_eager = module_state.why_unserved(module)
        """Why the module computes everything; empty if it does not."""
        self._state = None if self.why_eager else module_state.state_of(module)
        self.bytes = 0
        """Memory that it takes beside the module."""
        self.out_of_memory = False

    @property
    def name(self) -> str:
        """As recipes have it."""
        return f"{NAME}-{self._precision}" if self._precision else NAME

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(structure.folder for structure in self._structures.values() if structure.folder)

    def for_request(self) -> OpenVino | None:
        """None if the module is no longer the one that the graphs were made of, or will be."""
        module = self._module()
        same = not self.why_eager and module is not None and module_state.state_of(module) == self._state
        return self if same else None

    def state(self, module: str) -> RunnerState:
        """For people."""
        if self.why_eager or not self.for_request():
            return RunnerState(module, EAGER, self.why_eager or "it has changed since its graph was made")
        told = [self._told(structure) for structure in self._structures.values()]
        told += [f"at most {MAX_STRUCTURES} kinds of calls of a module have a graph"] if self._has_others else []
        detail = "; ".join(filter(None, dict.fromkeys(told)))
        ready = any(structure.graph for structure in self._structures.values())
        if not ready and self._structures and all(structure.refused for structure in self._structures.values()):
            return RunnerState(module, EAGER, detail)
        return RunnerState(module, self.name, detail or ("" if ready else "it is prepared for the first picture"))

    def _told(self, structure: _Structure) -> str:
        refused = sum(not same for same in structure.sizes.values())
        sizes = f"{refused} size{'s are' if refused > 1 else ' is'} computed without it" if refused else ""
        return structure.refused or ("it is being prepared" if not structure.settled else sizes)

    # What requests call.

    def prepare(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, wait: bool = False) -> bool:
        """Make what it needs for such a call, in the background or, with `wait`, now. Whether that is done."""
        module = self._module()
        if module is None or self.why_eager or method not in METHODS:
            return True
        try:
            arguments = call_arguments.read(module, args, kwargs, METHODS[method])
        except Unserved:
            return True
        key = METHODS[method], arguments.structure
        structure = self._structures.get(key)
        if structure is None and len(self._structures) == MAX_STRUCTURES:
            self._has_others = True
            return True
        if structure is None:
            structure = self._structures[key] = _Structure()
            work = functools.partial(self._prepare, structure, METHODS[method], arguments)
            work() if wait else self._background.submit(work)
        return structure.settled

    def serves(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return self._served(method, args, kwargs) is not None

    def run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str]:
        """The module's output, and the name of what computed it."""
        itself = functools.partial(target(self._module(), method), *args, **kwargs)
        served = self._served(method, args, kwargs)
        return self._run(*served, itself) if served else (itself(), EAGER)

    def _served(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[_Structure, Arguments] | None:
        """What computes such a call; None: the module itself."""
        module = self._module()
        if module is None or method not in METHODS or self.why_eager:
            return None
        with suppress(Unserved):
            arguments = call_arguments.read(module, args, kwargs, METHODS[method])
            structure = self._structures.get((METHODS[method], arguments.structure))
            if structure and structure.graph and structure.sizes.get(_size(arguments), True):
                return structure, arguments
        return None

    def _run(self, structure: _Structure, arguments: Arguments, itself: Callable[[], Any]) -> tuple[Any, str]:
        """`itself`: the module's own computation."""
        size = _size(arguments)
        known = size in structure.sizes
        try:
            output = self._computed(structure, arguments)
        except Exception as error:  # whatever OpenVINO raises, the module can compute it
            output, reason = None, told(error)
            if known:
                self.why_eager = f"OpenVINO failed: {reason}"
                log.warning("%s is computed by the module itself from now on: %s", self._kind, self.why_eager)
                self._release()
        if known and output is not None:
            return output, self.name
        own = itself()
        if known:
            return own, EAGER
        difference = float("inf") if output is None else outputs.difference(output, own)
        structure.sizes[size] = same = difference <= TOLERANCE[self._precision or "fp32"]
        if output is None:
            structure.failed.add(size)
        elif structure.folder:
            compared = {each: agrees for each, agrees in structure.sizes.items() if each not in structure.failed}
            kept.put_sizes(structure.folder, compared)
        if not same:
            why = f"it differs by {difference:.1e}" if output is not None else reason
            log.warning("%s: sizes %s are computed by the module itself: %s", self._kind, size, why)
        return (output, self.name) if same else (own, EAGER)

    def _computed(self, structure: _Structure, arguments: Arguments) -> Any:
        assert structure.graph and structure.form
        return structure.form.of(structure.graph.run(arguments.tensors), arguments.return_dict)

    def _release(self) -> None:
        for structure in self._structures.values():
            structure.graph, structure.refused = None, self.why_eager
        self.bytes = 0

    # In the background.

    def _prepare(self, structure: _Structure, method: str, arguments: Arguments) -> None:
        """Convert the module, or find what was converted before. Whatever happens, the structure is settled then."""
        module = self._module()
        if module is None:
            structure.refused = "its model was unloaded"
            return
        try:
            half = module_state.dtype_of(module) is torch.bfloat16 and graph.has_bf16()
            self._precision = "bf16" if half else "fp32"
            structure.form = graph.form(module, method, arguments)
            structure.folder = folder = self._folder / _digest(module, method, arguments, self._precision)
            if not (folder / graph.GRAPH).exists():
                log.info("%s is converted for OpenVINO", self._kind)
                graph.convert(module, method, arguments, folder)
            kept.touch(folder)
            structure.sizes = kept.sizes(folder)
            made = Graph(folder, self._precision, self._threads)
        except Exception as error:  # whatever is raised by tracing code that others wrote
            reason = str(error) if isinstance(error, Unserved) else f"{type(error).__name__}: {error}"
            self.out_of_memory = is_out_of_memory(error)
            structure.refused = f"no graph of it: {(reason.splitlines() or [''])[0][:300]}"
            log.warning("%s is computed by the module itself: %s", self._kind, structure.refused)
            return
        self.bytes += made.bytes
        structure.graph = made
        log.info("%s is computed by OpenVINO in %s", self._kind, self._precision)


def _size(arguments: Arguments) -> str:
    return " ".join("x".join(map(str, shape)) for shape in arguments.shapes)


def _digest(module: torch.nn.Module, method: str, arguments: Arguments, precision: str) -> str:
    """Of everything that a graph is made of, and of where its sizes were compared."""
    digest = hashlib.sha256()
    parts: list[Hashable] = [
        FORMAT, method, arguments.structure, precision, graph.library().get_version(), torch.__version__,
        diffusers.__version__, graph.processor(), source_digest.source_digest(module),
        repr(getattr(module, "config", "")),
    ]  # fmt: skip
    digest.update(repr(parts).encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    digest.update(repr(module_state.adapters_of(module)).encode())
    return digest.hexdigest()[:32]
