"""An S3 server on localhost: moto's, of the environment with Ray."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from cluster import environment
from support.answerable import within
from support.ports import free_port
from support.serving import TIMEOUT_S

BUCKET = "pictures"


class S3:
    """With an empty bucket. `env` is what a client of it needs."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.env = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}

    def names(self) -> set[str]:
        """What lies in the bucket."""
        text = httpx.get(f"{self.url}/{BUCKET}").text
        return {part.partition("</Key>")[0] for part in text.split("<Key>")[1:]}

    def answers(self) -> bool:
        try:
            return httpx.put(f"{self.url}/{BUCKET}").status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def running() -> Iterator[S3]:
    port = free_port()
    command = [environment.PYTHON, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            server = S3(f"http://127.0.0.1:{port}")
            within(TIMEOUT_S, server.answers)
            yield server
        finally:
            process.kill()
