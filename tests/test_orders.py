"""Models that are loaded, unloaded and pinned because somebody says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sfumato
from support.serving import Server

TINY = Path(sfumato.__file__).parent / "models" / "sfumato-tiny"
FILE = (
    "name: {name}\nparameters:\n  model: {tiny}\nstep: 2\nsize: 64x64\n"
    "diffusers:\n  enable_parameters: num_inference_steps\n"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("orders")
    (folder / "models").mkdir()
    for name in ("one", "two"):
        (folder / "models" / f"{name}.yaml").write_text(FILE.format(name=name, tiny=TINY))
    (folder / "models" / "gone.yaml").write_text("name: gone\nparameters:\n  model: no/such/folder.safetensors\n")
    with Server(folder / "models", folder / "data", "--loaded-models", "1") as server:
        yield server


def order(server: Server, what: str, **body: Any) -> None:
    answer = server.client.post(f"/v1/models/{what}", json=body)
    assert (answer.status_code, answer.json()) == (200, {"success": True})


def state(server: Server, name: str) -> dict[str, Any]:
    models = server.client.get("/v1/status").json()["models"]
    return next(each for each in models if each["id"] == name)  # type: ignore[no-any-return]


def until(server: Server, name: str, wanted: str) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while (now := state(server, name))["status"] != wanted:
        assert time.monotonic() < deadline, now
    return now


def test_a_model_is_loaded_and_unloaded_at_a_word(server: Server) -> None:
    order(server, "load", model="one")  # the worker may not be up yet: it is told when it is
    assert until(server, "one", "ready")["device"] == "cpu"
    order(server, "unload", model="one")
    assert until(server, "one", "unloaded")["detail"] == "unloading was requested"
    order(server, "load", model="one")
    until(server, "one", "ready")
    order(server, "unload")
    until(server, "one", "unloaded")
    assert server.draw(model="one", prompt="a cat").status_code == 200


def test_a_model_that_draws_leaves_when_it_is_done(server: Server) -> None:
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.draw(model="one", prompt="a cat", steps=300)))
    thread.start()
    while not any(each["status"] == "drawing" for each in server.client.get("/v1/images/progress").json()["data"]):
        assert thread.is_alive()
    order(server, "unload", model="one")
    thread.join()
    assert answers[0].status_code == 200
    until(server, "one", "unloaded")


def test_a_pinned_model_stays_while_others_leave(server: Server) -> None:
    assert server.draw(model="one", prompt="a cat").status_code == 200
    assert server.draw(model="two", prompt="a cat").status_code == 200
    assert state(server, "one")["status"] == "unloaded"
    order(server, "pin", model="two", pinned=True)
    assert state(server, "two")["pinned"]
    assert server.draw(model="one", prompt="a cat").status_code == 200
    assert state(server, "two")["status"] == "ready"
    order(server, "pin", model="two", pinned=False)
    order(server, "unload", model="one")
    until(server, "one", "unloaded")
    assert server.draw(model="one", prompt="a cat").status_code == 200
    assert state(server, "two")["status"] == "unloaded"


def test_what_cannot_be_loaded_says_why_in_its_status(server: Server) -> None:
    order(server, "load", model="gone")
    assert "no/such" in until(server, "gone", "failed")["detail"]
    assert server.draw(model="one", prompt="a cat").status_code == 200


@pytest.mark.parametrize("what", ["load", "unload", "pin"])
def test_a_model_that_there_is_not(server: Server, what: str) -> None:
    answer = server.client.post(f"/v1/models/{what}", json={"model": "no-such"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_the_state_tells_what_was_done(server: Server) -> None:
    before = server.client.get("/v1/status").json()
    assert server.draw(model="one", prompt="a cat").status_code == 200
    now = server.client.get("/v1/status").json()
    assert now["pictures"] == before["pictures"] + 1
    assert now["steps"] >= before["steps"] + 2
    assert now["memory"]["resident"] > 2**20
    assert now["line"] == {"waiting": 0, "drawing": 0, "places": 16, "limit": 64}
    assert "a cat" not in str(now)
