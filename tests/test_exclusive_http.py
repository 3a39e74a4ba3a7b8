"""Over HTTP: whoever goes away or is stopped while a pipeline that does not switch draws costs no further steps."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest

from support import tiny
from support.played import guided
from support.serving import Server

LONG: dict[str, Any] = {"prompt": "a cat", "model": "pag", "step": 900, "size": "64x64", "scheduler": "ddim"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save(guided(), folder / "pag")
    (folder / "pag.yaml").write_text(f"name: pag\nparameters:\n  model: {folder / 'pag'}\ndtype: fp32\n")
    return folder


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(models, tmp_path_factory.mktemp("data")) as server:
        assert server.draw(**LONG | {"step": 2}).status_code == 200
        yield server


def steps(server: Server) -> int:
    """Of all pictures so far, once the worker has told: with the end of a request."""
    assert server.draw(**LONG | {"step": 2}).status_code == 200
    found = re.search(r"^sfumato_steps_total (\S+)", server.client.get("/metrics").text, re.MULTILINE)
    assert found
    return int(float(found[1]))


def under_way(server: Server, id: str) -> int:
    """Waits until it has begun with its steps; how many it has done."""
    while True:
        answer = server.client.get(f"/v1/images/progress/{id}")
        if answer.status_code == 200 and answer.json()["step"] > 0:
            return int(answer.json()["step"])


def test_delete_stops_it_and_health_is_answered_meanwhile(server: Server) -> None:
    before = steps(server)
    with ThreadPoolExecutor(1) as pool:
        headers = {"x-request-id": "victim"}
        answer = pool.submit(server.client.post, "/v1/images/generations", json=LONG, headers=headers)
        under_way(server, "victim")
        waits = []
        for _ in range(20):
            start = time.perf_counter()
            assert server.client.get("/healthz").status_code == 200
            waits.append(time.perf_counter() - start)
        assert server.client.delete("/v1/images/progress/victim").status_code < 300
        assert answer.result().status_code == 499
    assert steps(server) - before < 900
    assert median(waits) < 0.1
    assert max(waits) < 2


def test_a_dropped_connection_stops_it(server: Server) -> None:
    before = steps(server)
    with (
        server.client.stream(
            "POST", "/v1/images/generations", json=LONG | {"stream": True, "partial_images": 3}
        ) as answer,
    ):
        assert answer.status_code == 200
        next(answer.iter_lines())
    assert steps(server) - before < 900


def test_the_time_limit_stops_it(models: Path, tmp_path: Path) -> None:
    with Server(models, tmp_path, "--time-limit-s", "1") as server:
        answers = [server.draw(**LONG | {"step": 2})]
        while answers[-1].status_code != 200:  # the first loads the model
            answers.append(server.draw(**LONG | {"step": 2}))
        before = steps(server)
        assert server.draw(**LONG).status_code == httpx.codes.GATEWAY_TIMEOUT
        assert steps(server) - before < 900


def test_sigterm_ends_it_once_its_caller_has_left(models: Path, tmp_path: Path) -> None:
    with Server(models, tmp_path) as server:
        assert server.draw(**LONG | {"step": 2}).status_code == 200
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/images/generations", json=LONG, timeout=httpx.Timeout(30, read=1))
        start = time.perf_counter()
        assert server.stop() == 0
        assert time.perf_counter() - start < 25
