"""What a model keeps of what computes its modules, and what `auto` compares with a module."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from sfumato.batching.module_runner import ModuleRunner
from sfumato.status import RunnerState


class KeptRunner(Protocol):
    """Says for each request what computes one module. Used on one thread, apart from what `Background` does for it."""

    @property
    def name(self) -> str:
        """As recipes have it."""

    @property
    def bytes(self) -> int:
        """Memory that it takes beside the module."""

    def for_request(self) -> ModuleRunner | None:
        """What computes the module in a request that begins now; None: the module itself."""

    def state(self, module: str) -> RunnerState:
        """For people; `module`: its component."""


class Candidate(KeptRunner, ModuleRunner, Protocol):
    """One that computes calls itself, or says why it does not, and so can be measured."""

    @property
    def busy(self) -> bool:
        """Whether the module computes what is new to it for now, because something is being prepared."""

    @property
    def out_of_memory(self) -> bool:
        """Whether that is why it could not be prepared: another one may be, later."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """What it keeps on disk."""
