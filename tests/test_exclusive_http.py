"""Over HTTP: whoever goes away or is stopped while a pipeline that does not switch draws costs no further steps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support import tiny
from support.answerable import answerable
from support.held import GENERATIONS, Held, left
from support.played import guided
from support.serving import Server

LONG: dict[str, Any] = {"prompt": "a cat", "model": "pag", "step": 900, "size": "512x512", "scheduler": "ddim"}
SHORT = LONG | {"step": 2, "size": "64x64"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save(guided(), folder / "pag")
    (folder / "pag.yaml").write_text(f"name: pag\nparameters:\n  model: {folder / 'pag'}\ndtype: fp32\n")
    return folder


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(models, tmp_path_factory.mktemp("data")) as server:
        assert server.draw(**SHORT).status_code == 200
        yield server


def steps(server: Server) -> int:
    """Of all pictures so far, once the worker has told: with the end of a request."""
    assert server.draw(**SHORT).status_code == 200
    found = re.search(r"^sfumato_steps_total (\S+)", server.client.get("/metrics").text, re.MULTILINE)
    assert found
    return int(float(found[1]))


def test_delete_stops_it_and_health_is_answered_meanwhile(server: Server) -> None:
    before = steps(server)
    with Held(server, LONG) as victim:
        victim.drawing()
        with answerable(server.url, server.pid):
            pass
        assert not victim.answered
        assert victim.cancel().status_code == 499
    assert steps(server) - before < 900


def test_a_dropped_connection_stops_it(server: Server) -> None:
    before = steps(server)
    with (
        server.client.stream("POST", GENERATIONS, json=LONG | {"stream": True, "partial_images": 3}) as answer,
    ):
        assert answer.status_code == 200
        next(answer.iter_lines())
    assert steps(server) - before < 900


def test_the_time_limit_stops_it(models: Path, tmp_path: Path) -> None:
    with Server(models, tmp_path, "--time-limit-s", "20") as server:
        answers = [server.draw(**SHORT)]
        while answers[-1].status_code != 200:  # the first loads the model
            answers.append(server.draw(**SHORT))
        before = steps(server)
        assert server.draw(**LONG).status_code == httpx.codes.GATEWAY_TIMEOUT
        assert steps(server) - before < 900


def test_sigterm_ends_it_once_its_caller_has_left(models: Path, tmp_path: Path) -> None:
    with Server(models, tmp_path) as server:
        assert server.draw(**SHORT).status_code == 200
        left(server, LONG)
        assert server.stop() == 0
        assert "was cancelled with" in server.log
