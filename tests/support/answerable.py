"""Whether a server stays answerable while something is done to it, and gives back what that took."""

from __future__ import annotations

import http.client
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil

MEDIAN_S, WORST_S = 0.1, 2.0
"""Of an answer of /healthz, as far as the process that answers computed meanwhile: on a machine that others use as
well, it takes far longer without anybody's fault."""

LIMIT_S = 60.0
"""Of an answer, whoever computes."""

LEAST = 20
"""Answers, to have a median of."""


class Health:
    """Asks /healthz from a thread of its own, until it is closed."""

    def __init__(self, url: str, pid: int) -> None:
        self.seconds: list[float] = []
        self._server = psutil.Process(pid)
        self.failures: list[str] = []
        self._url = url
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def _ask(self) -> None:
        while not self._over.wait(0.02):
            began, computed = time.monotonic(), self._computed()
            # A connection for each: whoever asks for health has none.
            connection = http.client.HTTPConnection(urlsplit(self._url).netloc, timeout=LIMIT_S)
            try:
                connection.request("GET", "/healthz")
                answer = connection.getresponse()
                if answer.status != 200:
                    self.failures.append(f"{answer.status} {answer.read()!r}")
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
            finally:
                connection.close()
            self.seconds.append(min(time.monotonic() - began, self._computed() - computed))

    def _computed(self) -> float:
        """Seconds of CPU time of the server's process."""
        times = self._server.cpu_times()
        return float(times.user + times.system)


@contextmanager
def answerable(url: str, pid: int) -> Iterator[Health]:
    """What happens inside must not keep /healthz of the server, in process `pid`, from answering at once."""
    health = Health(url, pid)
    health._thread.start()
    try:
        yield health
        within(300, lambda: len(health.seconds) >= LEAST)
    finally:
        health._over.set()
        health._thread.join(2 * LIMIT_S)
    assert not health.failures, health.failures[:5]
    assert statistics.median(health.seconds) < MEDIAN_S, sorted(health.seconds)[-5:]
    assert max(health.seconds) < WORST_S, sorted(health.seconds)[-5:]


def memory_mb(pid: int) -> float:
    """Resident, of one process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208


def within(seconds: float, what: Callable[[], bool]) -> None:
    """Wait until something holds; fail when it does not come to hold in that time."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)
