"""`/healthz` is answered while the server imports its libraries, on the socket that it then gets."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from sfumato import __version__, logs
from sfumato.api.http import early as early_module
from sfumato.api.http.early import EarlyAnswers, answer
from sfumato.commands.serve import serve
from sfumato.process.supervisor import Supervisor
from sfumato.settings import Settings
from support.inside import Inside


@pytest.fixture
def early() -> Any:
    with EarlyAnswers("127.0.0.1", 0) as answers:
        yield answers


def url(early: EarlyAnswers) -> str:
    assert early.socket
    return f"http://127.0.0.1:{early.socket.getsockname()[1]}"


def test_it_is_alive_and_not_ready(early: EarlyAnswers) -> None:
    alive = httpx.get(f"{url(early)}/healthz?x=1")
    assert (alive.status_code, alive.json()) == (200, {"status": "ok", "version": __version__})
    head = httpx.head(f"{url(early)}/healthz")
    assert (head.status_code, head.content) == (200, b"")
    for method, path in (("GET", "/readyz"), ("POST", "/v1/images/generations"), ("POST", "/healthz"), ("GET", "/")):
        later = httpx.request(method, url(early) + path, json={"prompt": "a cup"} if method == "POST" else None)
        assert later.status_code == 503
        assert later.headers["retry-after"] == "1"
        assert later.headers["refresh"] == "1"  # a browser that shows it loads the page when it is there
        assert later.json()["error"]["code"] == "starting"


@pytest.mark.parametrize("sent", [b"", b"GET", b"\r\n\r\n", b"GET \r\n\r\n", b"x" * 20_000])
def test_nonsense_is_not_answered_and_stops_nothing(early: EarlyAnswers, sent: bytes) -> None:
    assert early.socket
    with contextlib.suppress(OSError), socket.create_connection(early.socket.getsockname()) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""
    assert httpx.get(f"{url(early)}/healthz").status_code == 200


def test_one_that_sends_byte_by_byte_does_not_hold_up_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(0.0, 0.2)
    monkeypatch.setattr(early_module.time, "monotonic", lambda: next(seconds))
    received: list[float] = []

    class Slow:
        def settimeout(self, left: float) -> None:
            assert left <= early_module.PATIENCE_S

        def recv(self, most: int) -> bytes:
            received.append(1)
            return b"x"

    assert answer(early_module._head(Slow())) == b""  # type: ignore[arg-type]
    assert len(received) == 2


def test_whoever_was_not_accepted_is_the_servers(early: EarlyAnswers) -> None:
    place = early.socket.getsockname()  # type: ignore[union-attr]
    bound = early.hand_over()
    assert bound
    assert early.hand_over() is None
    with bound, socket.create_connection(place) as client:
        client.sendall(b"hello")
        accepted, _ = bound.accept()
        with accepted:
            assert accepted.recv(5) == b"hello"


def test_an_address_that_is_taken_is_reported_by_the_server() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        EarlyAnswers("127.0.0.1", taken.getsockname()[1]) as answers,
    ):
        assert answers.hand_over() is None


def test_serve_answers_before_it_imports_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs the server finds the socket answered, and takes it."""
    seen = []

    def run(settings: Settings, engine: Any, early: EarlyAnswers) -> None:
        seen.append(httpx.get(f"{url(early)}/healthz").status_code)

    monkeypatch.setattr("sfumato.api.server.run", run)
    monkeypatch.setattr(Supervisor, "launched", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(logs, "configure", lambda settings: None)
    serve(Settings(port=0, log_level="error"))
    assert seen == [200]


def test_it_needs_the_standard_library_only() -> None:
    """That is what makes it early."""
    check = (
        "import sys, sfumato.commands.serve as s; heavy = {'fastapi', 'uvicorn', 'pydantic', 'PIL', 'asyncio'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stderr == ""


def test_the_answer_is_the_applications(tmp_path: Path) -> None:
    with Inside(tmp_path).client() as client:
        theirs = client.get("/healthz").json()
    _, _, body = answer(b"GET /healthz HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")
    assert json.loads(body) == theirs
