"""A real server in a process of its own, on a free port of localhost."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from PIL import Image

TIMEOUT_S = 300


class Server:
    """`sfumato serve` over a folder of model files; `with Server(...) as server:`."""

    def __init__(
        self,
        models: Path,
        data: Path,
        *flags: str,
        env: dict[str, str] | None = None,
        program: Sequence[str] = (sys.executable, "-m", "sfumato.cli"),
        cwd: Path | None = None,
    ) -> None:
        self.lines: list[str] = []
        self.data = data
        self._cwd = cwd
        self._command = [*program, "serve", "--port", "0"]
        self._command += ["--models", str(models), "--data", str(data), *flags]
        self._env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **(env or {})}
        self._news = threading.Condition()
        self._over = False

    def __enter__(self) -> Server:
        self._process = subprocess.Popen(self._command, env=self._env, cwd=self._cwd, stderr=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.wait_for(r"Sfumato \S+ on (http://127\.0\.0\.1:\d+)")[1]
        self.client = httpx.Client(base_url=self.url, timeout=TIMEOUT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self.stop()

    def stop(self) -> int:
        """SIGTERM, then the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Until it has ended; the exit code."""
        code = self._process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        return code

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait_for(self, pattern: str, after: int = 0) -> re.Match[str]:
        """The first match in the log (from line `after` on), as soon as it is there."""
        with self._news:
            found = self._news.wait_for(
                lambda: re.search(pattern, "".join(self.lines[after:])) or self._over, TIMEOUT_S
            )
        assert isinstance(found, re.Match), self.log
        return found

    def draw(self, **body: Any) -> httpx.Response:
        return self.client.post("/v1/images/generations", json=body)

    @property
    def pid(self) -> int:
        """Of the process that answers HTTP."""
        return self._process.pid

    @staticmethod
    def png_data_uri(size: tuple[int, int] = (64, 64), colour: str = "orange") -> str:
        file = io.BytesIO()
        Image.new("RGB", size, colour).save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            for line in stderr:
                with self._news:
                    self.lines.append(line)
                    self._news.notify_all()
        with self._news:
            self._over = True
            self._news.notify_all()
