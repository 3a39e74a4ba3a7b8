"""What every runner is: it computes the calls of one module, or says why it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from sfumato.batching.module_runner import ModuleRunner
from sfumato.status import RunnerState


class Candidate(ModuleRunner, Protocol):
    """The runner of one module. Used on one thread, apart from what `Background` does for it."""

    @property
    def name(self) -> str:
        """As recipes have it."""

    @property
    def bytes(self) -> int:
        """Memory that it takes beside the module."""

    @property
    def busy(self) -> bool:
        """Whether the module computes what is new to it for now, because something is being prepared."""

    @property
    def out_of_memory(self) -> bool:
        """Whether that is why it could not be prepared: another one may be, later."""

    def for_request(self) -> ModuleRunner | None:
        """What computes the module in a request that begins now; None: the module itself."""

    def state(self, module: str) -> RunnerState:
        """For people; `module`: its component."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """What it keeps on disk."""
