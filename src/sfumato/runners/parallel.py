"""The runner of `context_parallel`: the forward pass of one denoiser, divided between the devices of its worker.

Each device has the denoiser's weights and computes a part of the sequence of tokens; attention exchanges what it needs
(DeepSpeed Ulysses, https://arxiv.org/abs/2309.14509, as diffusers has it). What comes out is what the module computes
alone, up to rounding: at the first call of each size the module computes as well, and if the two differ by more, or
the sequence cannot be divided, that size is the module's.
"""

from __future__ import annotations

import functools
import logging
import weakref
from typing import Any

import torch

from sfumato.batching import outputs
from sfumato.batching.calls import target
from sfumato.batching.module_runner import numbers
from sfumato.batching.outcomes import is_out_of_memory
from sfumato.core import EAGER
from sfumato.errors import told
from sfumato.runners import arguments as call_arguments
from sfumato.runners import module_state
from sfumato.runners.arguments import Unserved
from sfumato.runners.background import Background
from sfumato.runners.group import Group, Refused
from sfumato.status import RunnerState

log = logging.getLogger(__name__)

NAME = "parallel"

METHODS = ("__call__", "forward")

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Allowed difference from the module at the first call of a size, relative to the output's largest value."""


def can_be_divided(module: Any) -> bool:
    """Whether diffusers knows how to divide its sequence."""
    return getattr(module, "_cp_plan", None) is not None


class Parallel:
    """The runner of one module. Used on one thread, apart from what `Background` does for it."""

    def __init__(self, module: torch.nn.Module, group: Group, background: Background) -> None:
        self.number = next(numbers)
        self._module = weakref.ref(module)
        self._kind = type(module).__name__
        self._group = group
        self._background = background
        self.why_eager = module_state.why_hooked(module)
        """Why the module computes everything; empty if it does not."""
        self._state = None if self.why_eager else module_state.state_of(module)
        self._tolerance = TOLERANCE.get(module_state.dtype_of(module), 1e-3)
        self._divided: torch.nn.Module | None = None
        self._begun = False
        self.sizes: dict[str, str] = {}
        """Shapes of the arguments → why the module computes them; empty if it does not."""

    @property
    def name(self) -> str:
        """As recipes have it."""
        return f"{NAME}-{self._group.size}"

    @property
    def bytes(self) -> int:
        """Those in main memory. The other devices' own are no part of what this one has."""
        copies = self._group.size - 1 if self._divided is not None and self._group.devices[0] == "cpu" else 0
        return copies * self._size

    @property
    def _size(self) -> int:
        module = self._module()
        return sum(each.nbytes for each in (*module.parameters(), *module.buffers())) if module else 0

    def for_request(self) -> Parallel | None:
        """None if the module is no longer what the other devices have."""
        module = self._module()
        same = not self.why_eager and module is not None and module_state.state_of(module) == self._state
        return self if same else None

    def state(self, module: str) -> RunnerState:
        if self.why_eager or not self.for_request():
            return RunnerState(module, EAGER, self.why_eager or "it has changed since other devices have it")
        told = [f"{self._size / 1e6:,.0f} MB on each of {', '.join(self._group.devices)}"]
        if self._divided is None:
            told = ["it is sent to the other devices" if self._begun else "it is prepared for the first picture"]
        refused = [reason for reason in self.sizes.values() if reason]
        if refused:
            told.append(f"{len(refused)} of {len(self.sizes)} sizes are computed without it: {refused[-1]}")
        return RunnerState(module, self.name, "; ".join(told))

    # What requests call.

    def prepare(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, wait: bool = False) -> bool:
        """Send the module to the other devices, in the background or, with `wait`, now. Whether that is done."""
        if not self._begun and not self.why_eager:
            self._begun = True
            self._send() if wait else self._background.submit(self._send)
        return self._divided is not None or bool(self.why_eager)

    def serves(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return self._sized(method, args, kwargs) is not None

    def run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str]:
        itself = functools.partial(target(self._module(), method), *args, **kwargs)
        size = self._sized(method, args, kwargs)
        if size is None:
            return itself(), EAGER
        try:
            output = self._group.forward(self.number, self._divided, args, kwargs)
        except Exception as error:  # whatever diffusers raises, the module can compute it
            if is_out_of_memory(error):
                raise  # the batcher makes room and tries again
            self._refuse(size, told(error))
            return itself(), EAGER
        return self._compared(size, output, itself)

    def _sized(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """The size of such a call; None: the module computes it."""
        module = self._module()
        if module is None or self._divided is None or method not in METHODS or self.why_eager:
            return None
        try:
            shapes = call_arguments.read(module, args, kwargs, "__call__", anywhere=True).shapes
        except Unserved:
            return None
        size = " ".join("x".join(map(str, shape)) for shape in shapes)
        return None if self.sizes.get(size) else size

    def _compared(self, size: str, output: Any, itself: Any) -> tuple[Any, str]:
        """The output, if it is the module's own; computed again there at the first call of a size."""
        if size in self.sizes:
            return output, self.name
        try:
            own = itself()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.sizes[size] = ""  # one device alone has no room for it: that is what the others are for
            return output, self.name
        difference = outputs.difference(output, own)
        if difference <= self._tolerance:
            self.sizes[size] = ""
            return output, self.name
        self._refuse(size, f"it differs by {difference:.1e}")
        return own, EAGER

    def _refuse(self, size: str, reason: str) -> None:
        self.sizes[size] = reason
        log.warning("%s: sizes %s are computed on one device: %s", self._kind, size, reason)

    # In the background.

    def _send(self) -> None:
        module = self._module()
        if module is None:
            self.why_eager = "its model was unloaded"
            return
        try:
            self._divided = self._group.hold(self.number, module)
        except Exception as error:  # whatever torch.distributed raises, the module can compute itself
            self.why_eager = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
            log.warning("%s is computed on one device: %s", self._kind, self.why_eager)
            return
        forget = functools.partial(self._group.drop, self.number)
        weakref.finalize(self, self._background.submit, forget).atexit = False
        log.info("%s is computed by %s", self._kind, ", ".join(self._group.devices))
