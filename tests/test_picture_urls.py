"""Picture URLs: the server fetches from public addresses only, however the way there is dressed."""

from __future__ import annotations

import base64
import http.server
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.inside import DRAW, Inside
from support.sites import PICTURE


class Target(http.server.BaseHTTPRequestHandler):
    """`/picture` is one; `/to/...` redirects to the URL behind it. Every request is on record."""

    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(f"{self.headers['host']}{self.path}")
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("location", self.path.removeprefix("/to/"))
            self.send_header("content-length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("content-length", str(len(PICTURE)))
        self.end_headers()
        self.wfile.write(PICTURE)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def target() -> Iterator[tuple[int, list[str]]]:
    """Port and record of a server on the loopback interface."""
    seen: list[str] = []
    handler = type("Recorded", (Target,), {"seen": seen})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_port, seen
        server.shutdown()
        thread.join()


def refused(folder: Path, url: str, **settings: str) -> str:
    """The message of the 400 that this picture URL leads to."""
    with Inside(folder, **settings).client() as client:
        answer = client.post("/v1/images/generations", json={**DRAW["json"], "image": url})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_image", "image")
    message: str = error["message"]
    return message


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.1.2.3", "2130706433", "0x7f000001", "0177.0.0.1", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]",
        "[::]", "user:password@127.0.0.1", "localhost", "LOCALHOST", "localhost.",
    ],
)  # fmt: skip
def test_row_24_loopback_in_every_dress(tmp_path: Path, target: tuple[int, list[str]], host: str) -> None:
    port, seen = target
    message = refused(tmp_path, f"http://{host}:{port}/picture")
    assert "could not be fetched" in message
    assert seen == []


@pytest.mark.parametrize(
    "host",
    ["10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "[fe80::1]", "[fd00::1]", "198.18.0.1"],
)
def test_row_24_private_and_link_local_addresses(tmp_path: Path, host: str) -> None:
    assert "not a public address" in refused(tmp_path, f"http://{host}/latest/meta-data")


def test_row_24_a_name_that_leads_to_loopback(
    tmp_path: Path, target: tuple[int, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that says so only the second time: it is asked once, and the answer is what is connected to."""
    port, seen = target
    resolve = socket.getaddrinfo
    asked: list[str] = []

    def getaddrinfo(host: str, *args: object, **more: object) -> object:
        if host != "rebinding.example":
            return resolve(host, *args, **more)  # type: ignore[arg-type]
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "93.184.215.14"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert "resolves to 127.0.0.1" in refused(tmp_path, f"http://rebinding.example:{port}/picture")
    assert seen == []
    assert asked == ["rebinding.example"]


def test_row_24_a_redirect_to_loopback(tmp_path: Path, target: tuple[int, list[str]]) -> None:
    """From a host that is allowed to one that is not."""
    port, seen = target
    url = f"http://127.0.0.1:{port}/to/http://localhost:{port}/picture"
    assert "not a public address" in refused(tmp_path, url, picture_hosts="127.0.0.1")
    assert seen == [url.removeprefix("http://")]


@pytest.mark.parametrize("scheme", ["file:///etc/passwd", "ftp://localhost/picture", "gopher://localhost/"])
def test_row_24_a_redirect_to_another_scheme(tmp_path: Path, target: tuple[int, list[str]], scheme: str) -> None:
    port, _ = target
    url = f"http://127.0.0.1:{port}/to/{scheme}"
    assert "could not be fetched" in refused(tmp_path, url, picture_hosts="127.0.0.1")


def test_row_24_redirects_come_to_an_end(tmp_path: Path, target: tuple[int, list[str]]) -> None:
    port, seen = target
    url = "/picture"
    for _ in range(5):
        url = f"/to/http://127.0.0.1:{port}{url}"
    assert "could not be fetched" in refused(tmp_path, f"http://127.0.0.1:{port}{url}", picture_hosts="127.0.0.1")
    assert len(seen) == 4


def test_row_24_a_host_that_is_allowed_is_fetched(tmp_path: Path, target: tuple[int, list[str]]) -> None:
    port, seen = target
    inside = Inside(tmp_path, picture_hosts="pictures.lan, 127.0.0.1")
    with inside.client() as client:
        for path in ("/picture", f"/to/http://127.0.0.1:{port}/picture"):
            body = {**DRAW["json"], "image": f"http://127.0.0.1:{port}{path}"}
            assert client.post("/v1/images/generations", json=body).status_code == 200
    assert len(seen) == 3
    assert all(generation.images for generation in inside.engine.seen)


PLACES = [
    ("/sdapi/v1/img2img", {"init_images": ["URL"]}, "init_images[0]"),
    ("/sdapi/v1/img2img", {"init_images": ["PICTURE"], "mask": "URL"}, "mask"),
    ("/sdapi/v1/extra-single-image", {"image": "URL", "upscaler_1": "u", "upscaling_resize": 4}, "image"),
    ("/sdapi/v1/png-info", {"image": "URL"}, "image"),
    ("/v1/images/recipe", {"image": "URL"}, "image"),
]  # fmt: skip
"""Route, body, the field that a message names."""


def body_of(template: dict[str, Any], url: str) -> dict[str, Any]:
    text = json.dumps(template).replace("URL", url).replace("PICTURE", base64.b64encode(PICTURE).decode())
    body: dict[str, Any] = json.loads(text)
    return body


@pytest.mark.parametrize(("path", "template", "param"), PLACES)
def test_case_row_34_every_picture_field_takes_urls(
    path: str, template: dict[str, Any], param: str, tmp_path: Path, target: tuple[int, list[str]]
) -> None:
    """The cases that failed; the acceptance rows above hold for each of them."""
    port, seen = target
    inside = Inside(tmp_path, picture_hosts="127.0.0.1")
    (tmp_path / "models" / "u.yaml").write_text(
        "name: u\nparameters: {model: some/one}\ndiffusers: {pipeline_type: StableDiffusionUpscalePipeline}\n"
    )
    with inside.client() as client:
        answer = client.post(path, json=body_of(template, f" HTTP://127.0.0.1:{port}/picture"))
    assert len(seen) == 1
    if path == "/v1/images/recipe":  # fetched; it has no recipe
        assert "does not say how it was made" in answer.json()["error"]["message"]
        return
    assert answer.status_code == 200, answer.text
    assert path.endswith("png-info") or inside.engine.seen[0].images


@pytest.mark.parametrize(("path", "template", "param"), PLACES)
@pytest.mark.parametrize("way", ["", "/to/http://169.254.169.254"])
def test_case_row_34_under_the_same_guards(
    path: str, template: dict[str, Any], param: str, way: str, tmp_path: Path, target: tuple[int, list[str]]
) -> None:
    port, seen = target
    inside = Inside(tmp_path, **({"picture_hosts": "127.0.0.1"} if way else {}))
    (tmp_path / "models" / "u.yaml").write_text(
        "name: u\nparameters: {model: some/one}\ndiffusers: {pipeline_type: StableDiffusionUpscalePipeline}\n"
    )
    with inside.client() as client:
        answer = client.post(path, json=body_of(template, f"http://127.0.0.1:{port}{way}/picture"))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_image", param)
    assert "public" in error["message"]
    assert len(seen) == bool(way)
