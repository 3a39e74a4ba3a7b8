"""The application in this process, over an engine that draws a plain square at once."""

from __future__ import annotations

import io
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from sfumato.api.app import create_app
from sfumato.config import ModelConfig
from sfumato.core import Done, Event, Generation
from sfumato.pictures.stores import store_of
from sfumato.serving.catalog import Catalog
from sfumato.serving.service import Service
from sfumato.settings import Settings
from support.fake_engine import FakeEngine, recipe_of

ELSEWHERE = ("203.0.113.7", 50000)
"""A client that is no proxy of anybody's."""


class Painter(FakeEngine):
    async def submit(self, config: ModelConfig, generation: Generation) -> AsyncGenerator[Event, None]:
        self.seen.append(generation)
        file = io.BytesIO()
        Image.new("RGB", (8, 8), "orange").save(file, "PNG")
        yield Done(file.getvalue(), recipe_of(config, generation))


class Inside:
    """`app`, and what it stands on."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        (folder / "models").mkdir(exist_ok=True)
        (folder / "models" / "m.yaml").write_text(
            "name: m\nparameters:\n  model: some/one\ndiffusers:\n  enable_parameters: image\n"
        )
        self.engine = Painter()
        self.settings = Settings(data=folder / "data", **settings)
        self.store = store_of(self.settings)
        self.service = Service(Catalog([folder / "models"]), self.engine, self.settings)
        self.app: FastAPI = create_app(self.service, self.store)

    def client(self, address: tuple[str, int] = ELSEWHERE, **options: Any) -> TestClient:
        return TestClient(self.app, client=address, raise_server_exceptions=False, **options)


DRAW: dict[str, Any] = {"json": {"prompt": "a cat", "model": "m"}}
"""Of a request to draw."""


@contextmanager
def running(inside: Inside) -> Iterator[int]:
    """On a real socket, as `sfumato serve` runs it; the port."""
    config = uvicorn.Config(inside.app, port=0, log_config=None, access_log=False, proxy_headers=False)
    server = uvicorn.Server(config)
    sock = config.bind_socket()
    sock.listen()  # who connects before the thread is there waits for it
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
