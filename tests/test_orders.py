"""Models that are loaded, unloaded and pinned because somebody says so."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import sfumato
from sfumato.cli import app
from support.held import LONG, Held
from support.serving import TIMEOUT_S, Server

TINY = Path(sfumato.__file__).parent / "models" / "sfumato-tiny"
FILE = (
    "name: {name}\nparameters:\n  model: {tiny}\nstep: 2\nsize: 64x64\n"
    "diffusers:\n  enable_parameters: num_inference_steps\n"
)

SHORT = {"prompt": "a cat", "steps": 100, "size": "128x128", "model": "one"}
"""Is drawn to its end, but not at once."""


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
    deadline = time.monotonic() + TIMEOUT_S
    while (now := state(server, name))["status"] != wanted:
        assert time.monotonic() < deadline, now
        time.sleep(0.02)
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
    """All who use it are drawn to their end, also while it was ordered to leave."""
    with Held(server, {**LONG, "model": "one"}) as long, Held(server, SHORT) as short:
        step = long.drawing()["step"]
        short.until(lambda seen: seen["step"])  # whoever comes after the order keeps the model
        order(server, "unload", model="one")
        assert state(server, "one")["status"] == "ready"
        assert long.drawing(step + 3)["status"] == "drawing"
        assert short.answer().status_code == 200
    until(server, "one", "unloaded")


def test_the_memory_is_free_when_the_answer_comes(server: Server) -> None:
    order(server, "load", model="one")
    until(server, "one", "ready")
    order(server, "unload", model="one")
    assert state(server, "one")["status"] == "unloaded"
    order(server, "unload", model="one")  # it is not there: that is what was wanted
    assert server.client.post("/v1/models/unload").json() == {"success": True}  # without a body: all
    assert server.client.post("/models/unload", json={}).json() == {"success": True}
    for misspelt in ({"modle": "one"}, {"model": ""}):  # not all of them
        assert server.client.post("/models/unload", json=misspelt).status_code == 400


def test_what_models_take_is_told(server: Server) -> None:
    def told() -> tuple[int | None, int | None, list[str]]:
        model = server.client.get("/v1/models/one").json()["sfumato"]
        lines = server.client.get("/metrics").text.splitlines()
        metric = [line for line in lines if line.startswith("sfumato_model_memory_bytes{")]
        return model["memory_bytes"], state(server, "one")["memory_bytes"], metric

    server.client.post("/v1/models/unload")
    assert told() == (None, None, [])
    assert server.draw(model="one", prompt="a cat").status_code == 200
    size, same, metric = told()
    assert size == same
    assert size is not None
    assert size > 2**20
    assert [float(line.split()[1]) for line in metric] == [size]
    assert 'model="one"' in metric[0]


def test_a_model_in_use_is_named_and_leaves_later(server: Server) -> None:
    with Held(server, {**LONG, "model": "one"}) as held:
        step = held.drawing()["step"]
        answer = server.client.post("/sdapi/v1/unload-checkpoint")
        assert (answer.status_code, answer.json()) == (200, {})
        assert "requests have ended: one" in answer.headers["x-sfumato-warning"]
        assert state(server, "one")["status"] == "ready"
        assert held.drawing(step + 3)["status"] == "drawing"
    until(server, "one", "unloaded")


def test_automatic1111_clients_free_memory_and_load_again(server: Server) -> None:
    assert server.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "two"}).status_code == 200
    answer = server.client.post("/sdapi/v1/reload-checkpoint")
    assert (answer.status_code, answer.json()) == (200, {})
    assert state(server, "two")["status"] == "ready"
    answer = server.client.post("/sdapi/v1/unload-checkpoint", json={})
    assert (answer.status_code, answer.json()) == (200, {})
    assert "x-sfumato-warning" not in answer.headers
    assert state(server, "two")["status"] == "unloaded"
    server.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "gone"})
    answer = server.client.post("/sdapi/v1/reload-checkpoint")
    assert answer.status_code == 500
    assert "no/such" in answer.text
    server.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "one"})


@pytest.mark.parametrize("route", ["/v1/models/unload", "/models/load", "/sdapi/v1/unload-checkpoint"])
def test_a_page_of_another_origin_frees_nothing(server: Server, route: str) -> None:
    answer = server.client.post(route, json={"model": "one"}, headers={"origin": "https://elsewhere.example"})
    assert answer.status_code == 403


def test_the_command_line_frees_memory(server: Server) -> None:
    order(server, "load", model="one")
    until(server, "one", "ready")

    def unload(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["unload", *arguments, "--url", server.url])

    done = unload("one")
    assert (done.exit_code, done.output) == (0, "one is unloaded\n")
    assert state(server, "one")["status"] == "unloaded"
    assert unload().output == "every model is unloaded\n"
    done = unload("no-such")
    assert done.exit_code != 0
    assert "no-such" in str(done.exception)


def test_the_command_line_says_that_nobody_answers() -> None:
    done = CliRunner().invoke(app, ["unload", "--url", "http://127.0.0.1:9"])
    assert "http://127.0.0.1:9 does not answer" in str(done.exception)


def test_a_model_whose_file_is_gone_is_still_unloaded(server: Server) -> None:
    file = server.data.parent / "models" / "leaving.yaml"
    file.write_text(FILE.format(name="leaving", tiny=TINY))
    assert server.draw(model="leaving", prompt="a cat").status_code == 200
    file.unlink()
    order(server, "unload", model="leaving")
    assert server.client.post("/v1/models/unload", json={"model": "leaving"}).status_code == 404


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
