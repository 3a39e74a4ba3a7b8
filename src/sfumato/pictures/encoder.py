"""Pictures are encoded in a thread of their own: a large PNG takes as long as several steps of a small picture.

Clips and sounds, which may take minutes, have another thread, so that no picture waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Encoder(Protocol):
    """Does work in the order in which it was given."""

    def later(self, work: Callable[[], None]) -> None:
        """Do it, and do not wait for it. It must not raise."""

    def result(self, work: Callable[[], T]) -> T:
        """Do it; returns what it returns, when it has returned."""


class _Here:
    """At once, where it is given."""

    def later(self, work: Callable[[], None]) -> None:
        work()

    def result(self, work: Callable[[], T]) -> T:
        return work()


HERE = _Here()


class EncoderThread:
    """In a thread of its own, and long work in a second one. What waits for a result lets others run meanwhile."""

    def __init__(self, wait: Callable[[], None], wake: Callable[[], None]) -> None:
        """`wait`: returns after a while, and others have run. `wake`: called in the thread after each piece of work."""
        self._pool, self._long = _pools()
        self._wait = wait
        self._wake = wake
        self._waiting = 0

    @property
    def busy(self) -> bool:
        """Whether anything waits for a result."""
        return self._waiting > 0

    def later(self, work: Callable[[], None]) -> None:
        self._pool.submit(work)

    def begin(self, work: Callable[[], T], *, long: bool = False) -> Future[T]:
        """Do it, and say so when it is done. Cancelled before it begins, it is forgotten with all that it holds.

        `long`: beside the work that is given later, and after that which was given before.
        """
        held = [work]  # the thread reads cancelled work only in its turn
        earlier = self._pool.submit(_nothing) if long else None

        def do() -> T:
            if earlier:
                earlier.result()
            return held.pop()()

        future = (self._long if long else self._pool).submit(do)
        future.add_done_callback(lambda _: held.clear())
        future.add_done_callback(self._done)
        return future

    def result(self, work: Callable[[], T]) -> T:
        future = self.begin(work)
        self._waiting += 1
        try:
            while not future.done():
                self._wait()
            return future.result()
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """End the threads, after the work that they were given. More work begins others."""
        for pool in (self._pool, self._long):
            pool.shutdown()
        self._pool, self._long = _pools()

    def _done(self, future: Future[Any]) -> None:
        self._wake()


def _pools() -> tuple[ThreadPoolExecutor, ThreadPoolExecutor]:
    return ThreadPoolExecutor(1, "sfumato-encode"), ThreadPoolExecutor(1, "sfumato-encode-long")


def _nothing() -> None:
    """The work before it is done when this is."""
