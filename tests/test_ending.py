"""Requests that still run when the server has to stop, against a real server process."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from support.serving import Server

LONG = {"prompt": "hang"}
"""The stub worker does one step of it, and hears nothing from then on: what `stop` has to cope with, too."""


def serving(folder: Path, *flags: str) -> Server:
    program = (sys.executable, "-m", "support.stub_serve", str(folder))
    return Server(folder / "models", folder / "data", *flags, program=program)


def streamed(server: Server, began: threading.Event) -> str:
    """All of a stream's text; `began` is set when it has begun."""
    with server.client.stream(
        "POST", "/v1/images/generations", json={**LONG, "stream": True, "partial_images": 1}
    ) as answer:
        assert answer.status_code == 200
        began.set()
        return "".join(answer.iter_text())


def half_sent(server: Server) -> socket.socket:
    """A request whose body does not come to its end."""
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port or 80))
    connection.sendall(
        b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: 1000\r\nexpect: 100-continue\r\n\r\n"
    )
    assert b"100 Continue" in connection.recv(65536)  # it is being read
    connection.sendall(b'{"prompt": "')
    return connection


def is_told(answer: httpx.Response) -> None:
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "server_stopping"
    assert answer.headers["x-should-retry"] == "true"
    assert answer.headers["x-request-id"]


def stop_by_term(server: Server) -> int:
    server.signal(signal.SIGTERM)
    return 0


def stop_by_two_interrupts(server: Server) -> int:
    server.signal(signal.SIGINT)
    server.wait_for("Waiting for connections to close")
    server.signal(signal.SIGINT)
    return 130


@pytest.mark.parametrize(("grace", "stop"), [("1", stop_by_term), ("300", stop_by_two_interrupts)])
def test_whoever_still_waits_is_told_to_come_again(tmp_path: Path, grace: str, stop: Callable[[Server], int]) -> None:
    began = threading.Event()
    flags = ("--grace-s", grace, "--max-active", "2")
    with serving(tmp_path, *flags) as server, ThreadPoolExecutor() as pool:
        stream: Future[str] = pool.submit(streamed, server, began)
        assert began.wait(120)
        drawing = pool.submit(server.draw, **LONG)
        waiting = pool.submit(server.client.post, "/sdapi/v1/txt2img", json={"prompt": "x"})
        server.wait_for(r"(?s): accepted.*: accepted.*: accepted")
        with half_sent(server) as connection:
            expected = stop(server)
            text = b"".join(iter(lambda: connection.recv(65536), b""))
            code = server.wait()
        assert b" 503 " in text.splitlines()[0]
        assert b"server_stopping" in text
        is_told(drawing.result())
        is_told(waiting.result())
        assert "server_stopping" in stream.result().splitlines()[-2]
        assert stream.result().splitlines()[-2].startswith("data: ")
        assert code == expected, server.log
        server.stop()
    assert "Traceback" not in server.log
    assert "4 running requests" in server.log


def test_what_is_done_within_the_grace_time_is_answered(tmp_path: Path) -> None:
    with serving(tmp_path, "--grace-s", "300") as server, ThreadPoolExecutor() as pool:
        drawing = pool.submit(server.draw, prompt="a red circle")
        server.wait_for(": accepted")
        assert server.stop() == 0
        assert drawing.result().status_code == 200
    assert "Traceback" not in server.log


def test_a_third_interrupt_lets_everything_fall(tmp_path: Path) -> None:
    with serving(tmp_path, "--grace-s", "300") as server, ThreadPoolExecutor() as pool:
        drawing = pool.submit(server.draw, **LONG)
        server.wait_for(": accepted")
        stop_by_two_interrupts(server)
        server.signal(signal.SIGINT)
        is_told(drawing.result())
        assert server.wait() != 0


def test_a_signal_ends_it_although_it_looks_at_nothing() -> None:
    """uvicorn would look ten times a second. Here it would be an hour until the next look."""
    child = subprocess.Popen([sys.executable, "-m", "support.hourly"], stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout
        assert child.stdout.readline() == "looked\n"
        child.terminate()
        text, _ = child.communicate(timeout=300)
    assert text == "looked\n"
    assert child.returncode == -signal.SIGTERM  # uvicorn raises it again at its end
