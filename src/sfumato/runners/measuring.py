"""A module and its candidates compute the same call in turns, one forward pass at a time."""

from __future__ import annotations

import logging
import statistics
import time
import weakref
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import psutil  # type: ignore[import-untyped]
import torch

from sfumato.batching.calls import target
from sfumato.core import EAGER
from sfumato.runners.candidate import Candidate
from sfumato.runners.measured import Measured, today

log = logging.getLogger(__name__)

ROUNDS = 3
"""Forward passes of each, in turns."""

ENOUGH_S = 30.0
"""A comparison that takes longer ends with the round it is in."""

MEMORY = 3
"""Copies of the weights in 32 bits that must fit into free memory before a candidate is tried."""

Trial: TypeAlias = Generator[bool, None, Measured | None]
"""Goes on by one forward pass: True; False while something is prepared in the background."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A call as a request made it."""

    at: str
    """Its size, for people."""
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def compared(module: weakref.ref[torch.nn.Module], sample: Sample, candidates: Mapping[str, Candidate]) -> Trial:
    """Returns what was measured, or None if it could not be. A loaded module is computed with; nothing refers to it."""
    ratios: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, candidate in candidates.items():
        if _lacks_memory(module()):
            log.info("%s is not tried: there is too little free memory", name)
            return None
        while not candidate.prepare(sample.method, sample.args, sample.kwargs):
            yield False
        while candidate.busy:
            yield False
        _, by = candidate.run(sample.method, sample.args, sample.kwargs)  # its first call of a size takes longer
        yield True
        if by == EAGER and candidate.out_of_memory:
            return None
        if by == EAGER:
            refused[name] = candidate.state("").detail or "it does not compute this"
        else:
            ratios[name] = round((yield from _ratio(module, candidate, sample)), 2)
    return Measured(sample.at, ratios, refused, today())


def _ratio(module: weakref.ref[torch.nn.Module], candidate: Candidate, sample: Sample) -> Generator[bool, None, float]:
    """How many calls of the candidate take as long as one of the module."""

    def own() -> None:
        target(module(), sample.method)(*sample.args, **sample.kwargs)

    def other() -> None:
        candidate.run(sample.method, sample.args, sample.kwargs)

    began, ratios = time.perf_counter(), list[float]()
    own()
    yield True
    while len(ratios) < ROUNDS and (not ratios or time.perf_counter() - began < ENOUGH_S):
        seconds = []
        for compute in (own, other):
            seconds.append(_seconds(compute, _device(module())))
            yield True
        ratios.append(seconds[0] / max(seconds[1], 1e-9))
    return statistics.median(ratios)


def _seconds(compute: Callable[[], None], device: torch.device) -> float:
    """How long it takes. An accelerator still computes when the call has returned."""
    _finish(device)
    start = time.perf_counter()
    compute()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _device(module: torch.nn.Module | None) -> torch.device:
    tensor = next(module.parameters(), None) if module else None
    return torch.device("cpu") if tensor is None else tensor.device


def _lacks_memory(module: torch.nn.Module | None) -> bool:
    needed = MEMORY * 4 * sum(tensor.numel() for tensor in module.parameters()) if module else 0
    return int(psutil.virtual_memory().available) < needed
