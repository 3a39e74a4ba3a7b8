"""Replies to parked requests, and outcomes of requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from sfumato.batching.trial import Trial


@dataclass(frozen=True, slots=True)
class Result:
    """Reply to a parked request: the output of its call."""

    value: Any
    by: str = ""
    """The name of what computed it, if the call had a runner."""


@dataclass(frozen=True, slots=True)
class Compute:
    """Reply to a parked request: compute the call yourself, and report to the trial if there is one."""

    trial: Trial | None = None
    member: int = 0
    """Its number among the trial's members."""


Reply: TypeAlias = Result | Compute


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended: with a value, or with an error."""

    value: Any = None
    error: BaseException | None = None


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's CPU allocator
