"""Files are encoded beside the loop: a large PNG takes as long as several steps of a small picture, a clip minutes."""

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
    """In a thread of its own, and a second one for clips and sounds: no picture waits for their files.

    What waits for a result lets others run meanwhile.
    """

    def __init__(self, wait: Callable[[], None], wake: Callable[[], None]) -> None:
        """`wait`: returns after a while, and others have run. `wake`: called in the thread after each piece of work."""
        self._pool, self._long = _pool(), _pool()
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
        """Do it, and say so when it is done. `long`: beside what is given later, but after what was given before."""
        if long:
            earlier = self._pool.submit(_nothing)
            future = self._long.submit(lambda: (earlier.result(), work())[1])
        else:
            future = self._pool.submit(work)
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
        self._pool.shutdown()
        self._long.shutdown()
        self._pool, self._long = _pool(), _pool()

    def _done(self, future: Future[Any]) -> None:
        self._wake()


def _nothing() -> None:
    pass


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "sfumato-encode")
