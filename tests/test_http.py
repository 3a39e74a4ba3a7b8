"""The server as an operator sees it: health, status, new files, bad bodies, clients that leave."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.held import LONG, left
from support.hub import Hub
from support.serving import Server

MODEL = "name: {name}\nparameters:\n  model: nitrosocke/Ghibli-Diffusion\nstep: 2\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("http")
    (models / "m.yaml").write_text(MODEL.format(name="m"))
    with Server(models, folder / "data", "--max-body-mb", "1", env=hub.environment(folder / "hf")) as server:
        yield server


def status_of(server: Server, name: str) -> dict[str, object]:
    listed = server.client.get("/v1/models").json()["data"]
    return next(model["sfumato"] for model in listed if model["id"] == name)  # type: ignore[no-any-return]


def test_the_first_download_shows_its_progress_and_blocks_nobody(tmp_path: Path, repositories: dict[str, Path]) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.yaml").write_text(MODEL.format(name="m"))
    with Hub() as hub:
        hub.add("nitrosocke/Ghibli-Diffusion", repositories["nitrosocke/Ghibli-Diffusion"])
        hub.hold("nitrosocke/Ghibli-Diffusion")
        env = hub.environment(tmp_path / "hf")
        with Server(tmp_path / "models", tmp_path / "data", env=env) as server:
            body = json.dumps({"prompt": "a cat", "model": "m"}).encode()
            address = httpx.URL(server.url)
            with socket.create_connection((address.host, address.port or 80)) as request:
                head = "POST /v1/images/generations HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
                head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
                request.sendall(head.encode() + body)
                hub.wait_held("nitrosocke/Ghibli-Diffusion")
                assert status_of(server, "m")["status"] == "downloading"
                assert server.client.get("/healthz").json()["status"] == "ok"
                assert server.client.get("/readyz").status_code == 200
                hub.release("nitrosocke/Ghibli-Diffusion")
                answer = b"".join(iter(lambda: request.recv(65536), b""))
            assert answer.startswith(b"HTTP/1.1 200")
            assert status_of(server, "m")["status"] == "ready"


def test_a_new_model_file_needs_no_restart(server: Server, models: Path) -> None:
    assert server.draw(model="late", prompt="a cat").status_code == 404
    (models / "late.yaml").write_text(MODEL.format(name="late"))
    assert server.draw(model="late", prompt="a cat").status_code == 200
    (models / "late.yaml").write_text("name: late\nparameters:\n  modle: x\n")
    broken = server.draw(model="late", prompt="a cat")
    assert broken.status_code == 500
    assert broken.json()["error"]["code"] == "model_file_invalid"
    assert server.draw(model="m", prompt="a cat").status_code == 200
    (models / "late.yaml").unlink()
    assert server.draw(model="late", prompt="a cat").status_code == 404


@pytest.mark.parametrize("path", ["/v1/images/generations", "/images/generations"])
def test_with_and_without_v1(server: Server, path: str) -> None:
    assert server.client.post(path, json={"prompt": "a cat"}).status_code == 200


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b"", 400, "JSON"),
        (b"[]", 400, ""),
        (b"{}", 400, "prompt"),
        (b'{"prompt": 5}', 400, "prompt"),
        (b'{"prompt": "x", "n": "many"}', 400, "n: 'many'"),
        (b'{"prompt": "x", "step": 2.5}', 400, "2.5"),
        (b'{"prompt": "x", "response_format": "gif"}', 400, "url"),
        (b'{"prompt": "x", "seed": 1e400}', 400, "seed"),
        (b'{"prompt": "' + b"x" * (1 << 20) + b'"}', 413, "larger than 1 MiB"),
    ],
)
def test_bad_bodies(server: Server, content: bytes, status: int, words: str) -> None:
    answer = server.client.post("/v1/images/generations", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_without_a_length_is_capped_too(server: Server) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(32):
            yield b"x" * (1 << 16)
        yield b'"}'

    answer = server.client.post(
        "/v1/images/generations", content=chunks(), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
    assert "larger than 1 MiB" in answer.json()["error"]["message"]


def test_unknown_routes_have_the_error_shape(server: Server) -> None:
    for answer, status in (
        (server.client.get("/v1/nothing"), 404),
        (server.client.get("/v1/images/generations"), 405),
        (server.client.get("/generated-images/../../etc/passwd"), 404),
        (server.client.get("/generated-images/" + "0" * 32 + ".png"), 404),
    ):
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_request_ids(server: Server) -> None:
    assert server.client.get("/healthz", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    first, second = (server.client.get("/healthz").headers["x-request-id"] for _ in range(2))
    assert first != second


def test_row_27_an_output_folder_that_takes_nothing_is_an_error(models: Path, tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    with Server(models, tmp_path / "data", env=hub.environment(tmp_path / "hf")) as server:
        answer = server.draw(model="m", prompt="a cat")
        assert answer.status_code == 507
        assert answer.json()["error"]["code"] == "storage_failed"
        assert server.draw(model="m", prompt="a cat", response_format="b64_json").status_code == 200


def test_a_client_that_leaves_stops_the_work(server: Server) -> None:
    before = len(server.lines)
    left(server, LONG | {"model": "m"})
    server.wait_for(r"was cancelled with \d+ steps left", before)
    assert server.draw(model="m", prompt="a cat").status_code == 200


def test_sigterm_ends_it_cleanly(models: Path, tmp_path: Path, hub: Hub) -> None:
    with Server(models, tmp_path / "data", env=hub.environment(tmp_path / "hf")) as server:
        assert server.draw(model="m", prompt="a cat").status_code == 200
        assert server.stop() == 0
