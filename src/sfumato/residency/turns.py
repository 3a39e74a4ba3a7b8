"""Let a model be loaded in one thread while requests draw in another, although libraries change torch for both.

diffusers and transformers set torch's default dtype, which belongs to the whole process, while they build a module
without weights. A request that runs at that moment would make tensors of that dtype. `Turns` keeps the two apart: the
loop's turns and these sections of a load alternate, so that neither waits for longer than one of the other. Reading
the weights, which takes most of the time, is in no section.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

SECTION, TURN = "section", "turn"


class Turns:
    """Two parties, of which one runs at a time; if both wait, the one that did not run last goes first."""

    def __init__(self) -> None:
        self.reading = threading.Lock()
        """Held by the thread that reads weights: libraries change more of torch meanwhile, for all threads."""
        self._changed = threading.Condition()
        self._waiting: set[str] = set()
        self._running = self._last = ""

    def begin(self, party: str) -> None:
        with self._changed:
            self._waiting.add(party)
            self._changed.wait_for(lambda: not self._running and (self._last != party or len(self._waiting) == 1))
            self._waiting.discard(party)
            self._running = self._last = party

    def end(self) -> None:
        with self._changed:
            self._running = ""
            self._changed.notify_all()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One turn of the loop."""
        self.begin(TURN)
        try:
            yield
        finally:
            self.end()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """For the thread that loads: from now on its changes of torch's default dtype are sections.

        It ends with the dtype that it began with: diffusers does not restore it when building a module fails.
        """
        with self.reading:
            section = _Section(self, torch.set_default_dtype)
            torch.set_default_dtype = section.set_default_dtype
            try:
                yield
            finally:
                torch.set_default_dtype = section.original
                section.close()


class _Section:
    """What replaces `torch.set_default_dtype` while a model is loaded; calls of other threads pass through."""

    def __init__(self, turns: Turns, original: Callable[[torch.dtype], None]) -> None:
        self.original = original
        self._turns = turns
        self._thread = threading.get_ident()
        self._ambient = torch.float32
        self._inside = False

    def set_default_dtype(self, dtype: torch.dtype, /) -> None:
        if threading.get_ident() != self._thread:
            self.original(dtype)
            return
        if not self._inside:
            self._turns.begin(SECTION)
            self._inside = True
            self._ambient = torch.get_default_dtype()
        self.original(dtype)
        if dtype == self._ambient:
            self._leave()

    def close(self) -> None:
        if self._inside:
            self.original(self._ambient)
            self._leave()

    def _leave(self) -> None:
        self._inside = False
        self._turns.end()
