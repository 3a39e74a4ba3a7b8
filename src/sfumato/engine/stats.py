"""The worker's counters, and when it reports them."""

from __future__ import annotations

import re
import resource
import time
from collections import Counter
from pathlib import Path

import torch

from sfumato.batching.batcher import Batcher
from sfumato.residency.pool import ModelPool
from sfumato.status import EngineStats

EVERY_S = 1.0
"""Minimum interval between reports while no request ends."""

DENOISER = re.compile(r"(.*\.)?(unet|transformer|prior|decoder)(_\d+)?$")
"""Names of components called at each step; the denoiser of a cascade's second stage is a `decoder`."""

STATM = Path("/proc/self/statm")


class Stats:
    """Counters of one worker. The batcher and the pool have their own; the steps are counted here."""

    def __init__(self, batcher: Batcher, pool: ModelPool) -> None:
        self._batcher = batcher
        self._pool = pool
        self._steps = 0
        self._step_seconds = 0.0
        self._since: dict[str, float] = {}
        self._reported_at = 0.0
        self._changed = False

    def started(self, id: str) -> None:
        """The model is loaded: the first step of this request begins."""
        self._since[id] = time.perf_counter()

    def stepped(self, id: str) -> None:
        now = time.perf_counter()
        self._steps += 1
        self._step_seconds += now - self._since.get(id, now)
        self._since[id] = now

    def ended(self, id: str) -> None:
        self._since.pop(id, None)
        self._changed = True

    def changed(self) -> None:
        """A model was loaded, unloaded or failed to load."""
        self._changed = True

    def due(self, idle: bool) -> bool:
        """Whether to report now: about once a second, and at once if there is news and the worker is idle."""
        overdue = time.perf_counter() - self._reported_at >= EVERY_S
        return overdue or (idle and self._changed)

    def stats(self) -> EngineStats:
        self._reported_at = time.perf_counter()
        self._changed = False
        sizes: Counter[int] = Counter()
        for (name, calls), forwards in self._batcher.counts.batch_sizes.items():
            if DENOISER.match(name):
                sizes[calls] += forwards
        return EngineStats(
            forwards=sum(count.forwards + count.proving for count in self._batcher.counts.values()),
            batch_sizes=dict(sizes),
            unbatched={(name, str(reason)): calls for (name, reason), calls in self._batcher.counts.unbatched.items()},
            prompt_hits=self._batcher.prompt_cache.hits,
            prompt_misses=self._batcher.prompt_cache.misses,
            prompt_cache_bytes=self._batcher.prompt_cache.size,
            steps=self._steps,
            step_seconds=self._step_seconds,
            loads=self._pool.loads,
            evictions=self._pool.evictions,
            resident_models=len(self._pool),
            model_bytes=self._pool.sizes,
            memory_bytes=_memory(),
            device_memory_bytes=torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
        )


def _memory() -> int:
    """Resident memory of this process, in bytes; without /proc, its peak."""
    if STATM.exists():
        return int(STATM.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
