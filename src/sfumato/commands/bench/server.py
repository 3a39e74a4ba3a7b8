"""A server in a process of its own for a measurement: an empty data folder, a free port, no keys."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from sfumato.errors import SfumatoError

ADDRESS = re.compile(r"Sfumato \S+ on (http://\S+)")
UNFIT = ("SFUMATO_API_KEYS", "SFUMATO_HOST", "SFUMATO_PORT", "SFUMATO_DATA", "SFUMATO_GALLERY_URL", "SFUMATO_LOG_JSON")
"""Settings of the environment that a measurement does not take over."""

START_S = 120
"""A server that takes longer to answer is broken."""


@dataclass(frozen=True, slots=True)
class Server:
    client: httpx.Client
    start_s: float
    """From its start to the first answer of /healthz."""


PROGRAM = ("-m", "sfumato.cli")
"""What Python runs."""


@contextmanager
def running(models: Path, program: Sequence[str] = PROGRAM) -> Iterator[Server]:
    """Serve a folder of model files, with the other settings of the environment. Raises SfumatoError with its log."""
    with tempfile.TemporaryDirectory(prefix="sfumato-bench-") as data:
        command = [sys.executable, *program, "serve", "--host", "127.0.0.1", "--port", "0"]
        environment = {name: value for name, value in os.environ.items() if name not in UNFIT}
        began = time.perf_counter()
        command += ["--models", str(models), "--data", data]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            log = _Log(process)
            try:
                with httpx.Client(base_url=log.address(), timeout=None, trust_env=False) as client:
                    while not _answers(client):
                        if process.poll() is not None or time.perf_counter() - began > START_S:
                            raise SfumatoError(f"the server did not start:\n{log.tail()}")
                        time.sleep(0.01)
                    yield Server(client, time.perf_counter() - began)
            finally:
                process.terminate()
                log.end()


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").is_success
    except httpx.TransportError:
        return False


class _Log:
    """Reads all that a server writes, so that its pipe never fills; keeps the end of it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._lines: deque[str] = deque(maxlen=20)
        self._found = threading.Event()
        self._address = ""
        assert process.stderr
        self._thread = threading.Thread(target=self._read, args=(process.stderr,), daemon=True)
        self._thread.start()

    def address(self) -> str:
        """As soon as it says where it listens."""
        self._found.wait(START_S)
        if not self._address:
            raise SfumatoError(f"the server did not start:\n{self.tail()}")
        return self._address

    def end(self) -> None:
        """Read the rest; the server has been told to stop."""
        self._thread.join()

    def tail(self) -> str:
        return "".join(self._lines)

    def _read(self, lines: Iterator[str]) -> None:
        for line in lines:
            self._lines.append(line)
            if not self._address and (found := ADDRESS.search(line)):
                self._address = found[1]
                self._found.set()
        self._found.set()
