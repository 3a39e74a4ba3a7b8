"""How much memory of a device models may take: what the operator has set, or what the device has."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sfumato.models.footprint import Blocks, Needs, in_words

MIB = 2**20
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says how much memory a container may use: the second version of its control groups, and the first."""


@dataclass(slots=True)
class Budget:
    """In bytes, for each device. `size` of 0: all that the device has, except `headroom`."""

    size: int = 0
    headroom: int = 0
    _measured: dict[str, int] = field(default_factory=dict)

    def of(self, device: str) -> int:
        """What models on this device may take together."""
        if self.size:
            return self.size
        if device not in self._measured:
            self._measured[device] = capacity(device)
        return max(0, self._measured[device] - self.headroom)

    def refusal(self, name: str, needs: Needs, staying: Iterable[Blocks]) -> str:
        """Why a model can never be loaded, beside models that never leave; empty if it can.

        In main memory all components count, on an accelerator the largest: the others can wait in main memory.
        """
        required = needs.total if _kind(needs.device) == "cpu" else needs.largest
        budget, pinned = self.of(needs.device), _used(needs.device, staying)
        if required <= budget - pinned:
            return ""
        what = "its weights take" if required == needs.total else "its largest component takes, with activations,"
        beside = f", of which pinned models take {in_words(pinned)}" if pinned else ""
        rule = "the setting memory_mb" if self.size else "what it has, less the setting vram_headroom"
        return (
            f"{name}: {what} {in_words(required)} ({needs}) in {needs.dtype}; the budget of {needs.device} is "
            f"{in_words(budget)} ({rule}){beside}. Take a smaller model or dtype, or raise the setting"
        )

    def refusal_beside(self, name: str, needs: Needs, staying: Iterable[Blocks]) -> str:
        """Why a part can never be loaded for a request that uses `staying` at the same time; empty if it can."""
        budget, used = self.of(needs.device), _used(needs.device, staying)
        if needs.total <= budget - used:
            return ""
        return (
            f"{name}: its weights take {in_words(needs.total)} in {needs.dtype}, and the model with what else the "
            f"request uses {in_words(used)}; the budget of {needs.device} is {in_words(budget)}. It never fits: leave "
            "it out, take a smaller model, ControlNet or dtype, or raise the setting memory_mb"
        )

    def fits(self, needs: Needs, loaded: Iterable[Blocks]) -> bool:
        """Whether there is room for all its components beside the models that are loaded."""
        return needs.total + _used(needs.device, loaded) <= self.of(needs.device)


def capacity(device: str) -> int:
    """Bytes of memory that the device has; of main memory, what this process may use."""
    if _kind(device) == "cpu":
        return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits())
    try:
        return int(torch.accelerator.get_memory_info(torch.device(device))[1])
    except (RuntimeError, AttributeError):  # this device's backend does not tell
        return sys.maxsize


def _limits() -> list[int]:
    words = [path.read_text().strip() for path in CGROUPS if path.exists()]
    return [int(word) for word in words if word.isdecimal()]


def _used(device: str, models: Iterable[Blocks]) -> int:
    """Bytes on this kind of device; what models share counts once."""
    together = {block: size for blocks in models for block, size in blocks.items() if block[0] == _kind(device)}
    return sum(together.values())


def _kind(device: str) -> str:
    return device.partition(":")[0]
