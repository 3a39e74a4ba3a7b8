"""What is wrong with a request, and known without a download, is told at once, however slow this disk is."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sfumato.api.jobs import middleware
from sfumato.checkpoints import lora_files
from sfumato.errors import InvalidRequest
from sfumato.serving import foreseen
from support.answerable import within
from support.inside import Inside
from support.serving import TIMEOUT_S

PATHS = ("/v1/videos", "/v1/images/generations")
PAINTINGS = "name: paintings\nparameters: {model: some/one}\ndiffusers: {pipeline_type: StableDiffusionPipeline}\n"
FILMS = "name: films\nparameters: {model: some/two}\ndiffusers: {pipeline_type: WanPipeline}\n"
HOST = "models.example"
ASYNC = {"prefer": "respond-async"}


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inside:
    """No time at all to stand in the queue."""
    monkeypatch.setattr(middleware, "FIRST_S", 0.0)
    inside = Inside(tmp_path, lora_hosts=HOST)
    (tmp_path / "models" / "paintings.yaml").write_text(PAINTINGS)
    (tmp_path / "models" / "films.yaml").write_text(FILMS)
    return inside


@pytest.mark.parametrize(("path", "model"), [(PATHS[0], "paintings"), (PATHS[1], "films")])
def test_a_slow_check_is_waited_for(inside: Inside, monkeypatch: pytest.MonkeyPatch, path: str, model: str) -> None:
    read, checking, released = foreseen.static_capabilities, threading.Event(), threading.Event()

    def slow(config: Any) -> Any:
        checking.set()
        assert released.wait(TIMEOUT_S)
        return read(config)

    monkeypatch.setattr(foreseen, "static_capabilities", slow)
    answers: list[Any] = []
    with inside.client() as client:

        def ask() -> None:
            answers.append(client.post(path, json={"prompt": "a cat", "model": model}, headers=ASYNC))

        asking = threading.Thread(target=ask)
        asking.start()
        assert checking.wait(TIMEOUT_S)
        assert client.get("/v1/jobs").json()["data"]  # it is stored meanwhile
        released.set()
        asking.join()
        (answer,) = answers
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model"), answer.text
        within(TIMEOUT_S, lambda: not client.get("/v1/jobs").json()["data"])


def test_a_download_is_not_waited_for(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def slow(*_: Any, **__: Any) -> Any:
        released.wait(TIMEOUT_S)
        raise InvalidRequest("it is released")

    monkeypatch.setattr(lora_files.weight_file, "obtain", slow)
    lora = f"https://{HOST}/a.safetensors"
    with inside.client() as client:
        answer = client.post(PATHS[0], json={"prompt": "a cat", "model": "films", "loras": [{"name": lora}]})
        assert (answer.status_code, answer.json()["status"]) == (200, "queued"), answer.text
        released.set()


@pytest.mark.parametrize("name", ["nowhere", "some/lora", "https://elsewhere.example/a.safetensors"])
def test_what_cannot_be_downloaded_is_waited_for(inside: Inside, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Also beside one that is: it is looked for before."""
    locate, looking, released = lora_files.locate, threading.Event(), threading.Event()

    def slow(lora: Any, *others: Any) -> Any:
        assert lora.source == name
        looking.set()
        assert released.wait(TIMEOUT_S)
        return locate(lora, *others)

    monkeypatch.setattr(lora_files, "locate", slow)
    body = {"prompt": "a cat", "model": "films", "loras": [{"name": f"https://{HOST}/a.safetensors"}, {"name": name}]}
    with inside.client() as client, ThreadPoolExecutor(1) as threads:
        answered = threads.submit(client.post, PATHS[0], json=body)
        assert looking.wait(TIMEOUT_S)
        assert client.get("/v1/jobs").json()["data"]  # it is stored meanwhile
        released.set()
        answer = answered.result()
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "loras"), answer.text
