"""Replies to a parked request, how a request ends, and the counters of modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sfumato.batching.verification import Trial


@dataclass(frozen=True, slots=True)
class Result:
    """Reply to a parked request: here is the result."""

    value: Any


@dataclass(frozen=True, slots=True)
class Compute:
    """Reply to a parked request: compute the call yourself, and report to the trial if there is one."""

    trial: Trial | None = None
    member: int = 0


@dataclass(slots=True)
class Count:
    """Calls of a module, and the forward passes that computed them."""

    calls: int = 0
    forwards: int = 0
    proving: int = 0
    """Additional forward passes of proofs."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended: with a value, or with an error."""

    value: Any = None
    error: BaseException | None = None


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's CPU allocator
