"""`accelerate: auto`: a module is computed by what was the fastest for it on this machine.

Requests note the sizes that they call it with. Once the server is idle the module and its candidates compute such a
call in turns, one forward pass at a time, and what was measured is kept. A request takes the choice that stands at its
start, so no picture changes its runner in the middle.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sfumato.batching import cpu_threads
from sfumato.batching.calls import target
from sfumato.batching.module_runner import ModuleRunner, numbers
from sfumato.batching.outcomes import is_out_of_memory
from sfumato.core import EAGER
from sfumato.pipelines import source_digest
from sfumato.runners import arguments, measuring, module_state
from sfumato.runners.arguments import Unserved
from sfumato.runners.candidate import Candidate
from sfumato.runners.measured import Measured, Measurements, today
from sfumato.runners.measuring import Sample
from sfumato.status import RunnerState

log = logging.getLogger(__name__)

MAX_WAITING = 4
"""Sizes that wait to be measured; their arguments are kept until then."""


class Chosen:
    """What computes a module in the requests that begin until something else is measured."""

    def __init__(self, auto: Auto, module: torch.nn.Module, runners: Mapping[str, ModuleRunner]) -> None:
        """`runners`: for each size that the module does not compute itself."""
        self.number = next(numbers)
        self._auto = weakref.ref(auto)
        self._module = weakref.ref(module)
        self.runners = runners

    def prepare(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, wait: bool = False) -> bool:
        if auto := self._auto():
            auto.note(method, args, kwargs)
        runner = self._of(method, args, kwargs)
        return runner is None or runner.prepare(method, args, kwargs, wait=wait)

    def serves(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        runner = self._of(method, args, kwargs)
        return runner is not None and runner.serves(method, args, kwargs)

    def run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str]:
        if runner := self._of(method, args, kwargs):
            return runner.run(method, args, kwargs)
        return target(self._module(), method)(*args, **kwargs), EAGER

    def _of(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModuleRunner | None:
        return self.runners.get(_size(self._module(), method, args, kwargs)[0])


class Auto:
    """The choice for one module. Used on one thread."""

    def __init__(
        self,
        module: torch.nn.Module,
        threads: int,
        candidates: Mapping[str, Callable[[], Candidate]],
        measurements: Measurements,
    ) -> None:
        """`candidates`: by their names in `accelerate`, those that this machine can try."""
        self._module = weakref.ref(module)
        self._threads = threads
        self._candidates = candidates
        self._measurements = measurements
        self._state = module_state.state_of(module)
        why = module_state.why_unserved if "openvino" in candidates else module_state.why_hooked
        self._why_eager = why(module) if candidates else "no other runner is installed"
        self._key = "" if self._why_eager else _key(module, threads)
        self._measured = measurements.of(self._key)
        self._made: dict[str, Candidate] = {}
        self._waiting: dict[str, Sample] = {}
        self._trial: measuring.Trial | None = None
        self._chosen: Chosen | None = None

    @property
    def name(self) -> str:
        return "+".join(sorted({self._name(each) for each in self._measured.values()})) or EAGER

    @property
    def bytes(self) -> int:
        return sum(candidate.bytes for candidate in self._made.values())

    @property
    def outdated(self) -> bool:
        """Whether the module is another than the one that was measured."""
        module = self._module()
        return module is None or module_state.state_of(module) != self._state

    def for_request(self) -> Chosen | None:
        module = self._module()
        if self._why_eager or module is None or self.outdated:
            return None
        chosen = {size: self._candidate(each.chosen).for_request() for size, each in self._measured.items()
                  if each.chosen in self._candidates}  # fmt: skip
        runners = {size: runner for size, runner in chosen.items() if runner}
        if self._chosen is None or self._chosen.runners != runners:
            self._chosen = Chosen(self, module, runners)
        return self._chosen

    def state(self, module: str) -> RunnerState:
        detail = "; ".join(each.told({name: made.name for name, made in self._made.items()})
                           for each in self._measured.values())  # fmt: skip
        return RunnerState(module, self.name, self._why_eager or detail or "it is measured when the server is idle")

    def _name(self, measured: Measured) -> str:
        made = self._made.get(measured.chosen)
        return made.name if made else measured.chosen or EAGER

    def _candidate(self, name: str) -> Candidate:
        if name not in self._made:
            self._made[name] = self._candidates[name]()
        return self._made[name]

    # Measuring.

    def note(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A request makes this call: a size that was not measured yet will be."""
        module = self._module()
        size, at = _size(module, method, args, kwargs)
        if not size or size in self._measured or size in self._waiting or len(self._waiting) == MAX_WAITING:
            return
        try:
            arguments.read(module, args, kwargs, method)
        except Unserved:
            return
        args, kwargs = arguments.kept((args, kwargs))
        self._waiting[size] = Sample(at, method, args, kwargs)

    @property
    def due(self) -> bool:
        """Whether there is something to measure."""
        return bool(self._waiting) and not self.outdated

    def measure(self) -> bool:
        """Go on, by one forward pass at most. False: it waits for what is prepared in the background."""
        size, sample = next(iter(self._waiting.items()))
        if self._trial is None:
            self._trial = measuring.compared(
                self._module, sample, {name: self._candidate(name) for name in self._candidates}
            )
        try:
            with cpu_threads.using(self._threads):
                return next(self._trial)
        except StopIteration as end:
            measured = end.value
        except Exception as error:  # whatever a module raises: it is not measured, and the next request sees it
            log.exception("a runner could not be measured")
            measured = None
            if not is_out_of_memory(error):  # that passes; the rest is not tried again in this process
                refused = dict.fromkeys(self._candidates, "it failed")
                self._measured[size] = Measured(sample.at, refused=refused, when=today())
        self._trial = None
        del self._waiting[size]
        if measured:
            self._conclude(size, measured)
        if not self._waiting:
            self._discard_unused()
        return True

    def _conclude(self, size: str, measured: Measured) -> None:
        self._measured[size] = measured
        self._measurements.put(self._key, size, measured)
        log.info("%s: %s", type(self._module()).__name__, self.state("").detail)
        self._chosen = None

    def _discard_unused(self) -> None:
        for name in [name for name in self._made if not any(each.chosen == name for each in self._measured.values())]:
            _discard(self._made, name)


def _discard(made: dict[str, Candidate], name: str) -> None:
    """Free a candidate's memory, and what it keeps on disk, unless another model has it."""
    folders, last = made[name].folders, weakref.ref(made[name])
    del made[name]
    if last() is None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _size(module: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, str]:
    """Equal for calls that take about as long per row, and the size itself; empty if the call does not tell."""
    first = arguments.first(module, method, args, kwargs)
    if first is None or not first.dim():
        return "", ""
    sides = first.shape[2:] if first.dim() > 3 else first.shape[1:2]
    return f"{method} {round(math.log2(max(1, first[0].numel())))}", "x".join(map(str, sides))


def _key(module: torch.nn.Module, threads: int) -> str:
    """Of what the time of its forward passes depends on."""
    tensors = [(name, str(tensor.dtype), tuple(tensor.shape), _told(tensor.device))
               for name, tensor in (*module.named_parameters(), *module.named_buffers())]  # fmt: skip
    parts = (source_digest.source_digest(module), repr(getattr(module, "config", "")), threads, tensors,
             module_state.adapters_of(module))  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _told(device: torch.device) -> str:
    """The device and, of a GPU, its model: `machine.key` knows the processor only."""
    name_of = getattr(getattr(torch, device.type, None), "get_device_name", None)
    return f"{device} {name_of(device)}" if name_of else str(device)
