"""Work for later, in a thread of its own, one piece after another."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Background:
    """`wake` is called in that thread after each piece of work."""

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self._wake = wake
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._open = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._open > 0

    def submit(self, work: Callable[[], None]) -> None:
        """Do it as soon as what was submitted before is done; what it raises is logged."""
        with self._lock:
            self._open += 1
        self._work.put(work)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="sfumato-runners", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            self._do(self._work.get())
            with self._lock:
                self._open -= 1
            self._wake()

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:  # the next piece of work is another's
            log.exception("work in the background failed")
