"""Clients that connect and do nothing, or little: they hold nobody up, and leave nothing behind."""

from __future__ import annotations

import asyncio
import functools
import http.client
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from uvicorn.server import ServerState

from sfumato import logs
from sfumato.api.http.connections import Connection, Connections
from support.answerable import answerable, descriptors, memory_mb, threads, within
from support.serving import Server

PATIENCE = 3
GET = b"GET /healthz HTTP/1.1\r\nhost: x\r\n"
POST = b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


class Clients(ExitStack):
    """Sockets to one server, all closed at the end."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.address = urlsplit(server.url).hostname, urlsplit(server.url).port

    def connect(self, data: bytes = b"") -> socket.socket:
        connection = self.enter_context(socket.create_connection(self.address, timeout=60))
        connection.sendall(data)
        return connection


def read(connection: socket.socket) -> bytes:
    """Until the server closes it."""
    data = b""
    while True:
        try:
            more = connection.recv(65536)
        except ConnectionResetError:
            return data
        if not more:
            return data
        data += more


@contextmanager
def serving(folder: Path, *flags: str, files: int = 0) -> Iterator[Server]:
    """With so many descriptors, if that is a number."""
    server = Server(folder, folder / "data", *flags, "--patience-s", str(PATIENCE))
    if files:
        server._command = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *server._command]
    with server:
        assert server.draw(prompt="a cat", steps=1).status_code == 200
        yield server


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with 64 descriptors."""
    with serving(tmp_path_factory.mktemp("narrow"), files=64) as server:
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("wide")) as server:
        yield server


SENT: dict[str, bytes] = {
    "nothing": b"",
    "one byte": b"G",
    "half a head": GET,
    "a head without its body": POST + b"content-length: 100\r\n\r\n",
    "half a body": POST + b"content-length: 100\r\n\r\n{",
    "half a chunk": POST + b"transfer-encoding: chunked\r\n\r\n5\r\n{",
    "whole requests": GET + b"\r\n",
}


@pytest.mark.parametrize("what", SENT)
def test_row_18_eighty_of_them_and_64_descriptors(narrow: Server, what: str) -> None:
    before = descriptors(narrow.pid), threads(narrow.pid), memory_mb(narrow.pid), len(narrow.lines)
    with answerable(narrow.url, narrow.pid), Clients(narrow) as clients:
        for _ in range(80):
            clients.connect(SENT[what])
        for _ in range(20):
            assert httpx.get(f"{narrow.url}/healthz").status_code == 200
        answer = httpx.post(f"{narrow.url}/v1/images/generations", json={"prompt": "a cat", "steps": 1}, timeout=60)
        assert answer.status_code == 200  # pictures need descriptors as well
    within(120, lambda: descriptors(narrow.pid) <= before[0] + 1)
    assert threads(narrow.pid) <= before[1] + 4
    within(120, lambda: memory_mb(narrow.pid) < before[2] + 50)
    noise = [line for line in narrow.lines[before[3] :] if "INFO sfumato" not in line]
    assert len(noise) < 50, noise[:50]
    assert "system resource" not in "".join(noise)


def test_many_that_come_and_go(narrow: Server) -> None:
    before = descriptors(narrow.pid)
    with answerable(narrow.url, narrow.pid):
        for _ in range(10):
            with Clients(narrow) as clients:
                for _ in range(40):
                    clients.connect(GET)
    within(120, lambda: descriptors(narrow.pid) <= before + 1)


@pytest.mark.parametrize("what", [what for what in SENT if what != "whole requests"])
def test_whoever_is_silent_is_cut_off_and_told(server: Server, what: str) -> None:
    with Clients(server) as clients:
        began = time.monotonic()
        answer = read(clients.connect(SENT[what]))
        assert PATIENCE - 1.5 < time.monotonic() - began < PATIENCE + 60
    if what == "nothing":
        assert answer == b""
    else:
        assert answer.startswith(b"HTTP/1.1 408 ")
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert (error["code"], "patience_s" in error["message"]) == ("request_timeout", True)


def drip(connection: socket.socket, data: bytes, pause: float) -> bytes:
    """Byte for byte, until the server has enough of it; what it said."""
    connection.settimeout(pause)
    for byte in data:
        try:
            connection.send(bytes([byte]))
            if answer := connection.recv(65536):
                return answer
        except TimeoutError:
            continue
        except OSError:
            break
    return b""


def test_dripping_is_no_better_than_silence(server: Server) -> None:
    with Clients(server) as clients, answerable(server.url, server.pid):
        began = time.monotonic()
        for begun in (b"", POST + b"content-length: 100000\r\n\r\n"):
            answer = drip(clients.connect(begun), b"GET /healthz HTTP/1.1\r\nx: " + b"y" * 1000, 0.1)
            assert answer.startswith(b"HTTP/1.1 408 ")
        second = clients.connect(GET + b"\r\n")
        answer = b""
        while b'"}' not in answer:
            answer += second.recv(65536)
        assert drip(second, GET * 100, 0.1).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - began < 120


def test_a_slow_but_steady_body_is_taken(server: Server) -> None:
    body = json.dumps({"prompt": "a cat", "steps": 1, "user": "x" * 60_000}).encode()
    with Clients(server) as clients:
        connection = clients.connect(POST + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body))
        began = time.monotonic()
        for start in range(0, len(body), 2000):
            connection.sendall(body[start : start + 2000])
            time.sleep(0.2)  # the rate is the subject: 10 KB a second, for longer than the patience
        assert time.monotonic() - began > PATIENCE
        assert read(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("path", ["/docs/swagger-ui-bundle.js", "/openapi.json"])
def test_whoever_does_not_read_the_answers_is_cut_off(server: Server, path: str) -> None:
    before = descriptors(server.pid)
    with Clients(server) as clients, answerable(server.url, server.pid):
        for _ in range(10):
            connection = clients.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(clients.address)
            connection.sendall((b"GET %s HTTP/1.1\r\nhost: x\r\n\r\n" % path.encode()) * 20)
        within(120, lambda: descriptors(server.pid) >= before + 5)
        within(60, lambda: descriptors(server.pid) <= before + 1)


def test_half_closed_connections_leave(server: Server) -> None:
    before = descriptors(server.pid)
    with Clients(server) as clients:
        for data in SENT.values():
            clients.connect(data).shutdown(socket.SHUT_WR)
        within(120, lambda: descriptors(server.pid) <= before + 1)


def test_a_body_that_goes_on_after_the_answer_is_not_read_for_ever(server: Server) -> None:
    with Clients(server) as clients:
        connection = clients.connect(GET + b"transfer-encoding: chunked\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 60:
                connection.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
                time.sleep(0.01)


def test_a_body_in_crumbs_is_refused(server: Server) -> None:
    with answerable(server.url, server.pid), Clients(server) as clients:
        connection = clients.connect(POST + b"transfer-encoding: chunked\r\n\r\n")
        with pytest.raises(OSError):
            for _ in range(1000):
                connection.sendall(b"1\r\nx\r\n" * 10_000)


@pytest.mark.parametrize("path", [b"/v1/images/generations", b"/healthz", b"/nothing"])
def test_a_body_that_says_its_length_twice_brings_no_second_request(server: Server, path: bytes) -> None:
    """A proxy may believe the one word, and take what comes after the other for somebody else's request."""
    hidden = GET + b"\r\n"
    head = b"POST %s HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: %d\r\n\r\n"
    with Clients(server) as clients:
        answer = read(clients.connect(head % (path, 5 + len(hidden)) + b"0\r\n\r\n" + hidden))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"send one of them" in answer


def test_what_is_no_http_is_answered_in_our_shape(server: Server) -> None:
    before = len(server.lines)
    wrong = {
        b"nonsense\r\n\r\n": 400,
        b"GET / HTTP/1.1\r\n\r\n": 400,
        b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n": 400,
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n": 431,
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000 + b"\r\n": 431,
        POST + b"transfer-encoding: gzip\r\n\r\n": 501,
        POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\n": 400,
        POST + b"content-length: -5\r\n\r\n": 400,
        POST + b"transfer-encoding: chunked\r\n\r\nno number\r\n": 400,
    }
    with Clients(server) as clients:
        for _ in range(10):
            for data, status in wrong.items():
                answer = b""
                try:
                    answer = read(clients.connect(data))
                except OSError:  # it may be closed before all of it was sent
                    continue
                assert answer.startswith(b"HTTP/1.1 %d " % status) or (not answer and len(data) > 10_000), data[:99]
                if answer:
                    head, _, body = answer.partition(b"\r\n\r\n")
                    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
                    assert re.search(rb"\r\nx-request-id: [0-9a-f]{32}\r\n", head + b"\r\n")
    assert sum("Invalid HTTP" in line for line in server.lines[before:]) <= logs.RepeatFilter.MAX_REPEATS
    assert "Traceback" not in "".join(server.lines[before:])


def test_a_new_client_is_told_when_all_others_are_busy(tmp_path: Path) -> None:
    with serving(tmp_path, "--max-connections", "3") as server, Clients(server) as clients:
        body = b'{"prompt": "x", "steps": 1000}'
        for _ in range(3):
            clients.connect(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        within(
            60, lambda: server.log.count(": accepted") == 4
        )  # one was drawn before; until it asks any may have to go
        answers: list[bytes] = []

        def refused() -> bool:
            answers.append(read(clients.connect(GET + b"connection: close\r\n\r\n")))
            return answers[-1].startswith(b"HTTP/1.1 503")

        within(120, refused)
        assert json.loads(answers[-1].partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"


def test_keep_alive_lasts(server: Server) -> None:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
    for _ in range(100):
        connection.request("GET", "/healthz")
        assert connection.getresponse().read()
    first = connection.sock
    assert first is not None
    connection.close()


def test_answers_are_sent_at_once() -> None:
    """As `sfumato serve` makes its socket: its protocol is not named, and asyncio then lets answers wait 40 ms."""
    held: list[int] = []

    class Seen(Connection):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            accepted = transport.get_extra_info("socket")
            held.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    async def connect() -> None:
        config = uvicorn.Config(FastAPI(), port=0, log_config=None)
        config.load()
        made = functools.partial(
            Seen, connections=Connections(9, 9), config=config, server_state=ServerState(), app_state={}
        )
        sock = config.bind_socket()
        async with await asyncio.get_running_loop().create_server(made, sock=sock) as server:
            reader, writer = await asyncio.open_connection(*sock.getsockname()[:2])
            writer.write(GET + b"connection: close\r\n\r\n")
            assert b"404" in await reader.read()
            writer.close()
            server.close()

    asyncio.run(connect())
    assert held == [1]


def test_lines_are_not_repeated_without_end() -> None:
    now = [0.0]
    repeated = logs.RepeatFilter(lambda: now[0])

    def shown(name: str, words: str, *args: object, level: int = logging.WARNING) -> str:
        record = logging.LogRecord(name, level, "", 0, words, args, None)
        return record.getMessage() if repeated.filter(record) else ""

    lines = [shown("uvicorn.error", "bad request %d", i) for i in range(1000)]
    assert [line for line in lines if line] == [f"bad request {i}" for i in range(repeated.MAX_REPEATS)]
    assert all(shown("sfumato.commands.check", "file %d", i) for i in range(100))
    assert sum(bool(shown("sfumato.commands.check", "the same")) for _ in range(100)) == repeated.MAX_REPEATS
    assert all(shown("sfumato.access", "GET /", level=logging.INFO) for _ in range(1000))
    now[0] = repeated.WINDOW_S + 1
    left = 1000 - repeated.MAX_REPEATS
    assert shown("uvicorn.error", "bad request %d", 5) == f"bad request 5 ({left} similar messages suppressed)"
    for i in range(5000):
        shown("sfumato.commands.check", f"file {i}")
    assert len(repeated._windows) <= repeated.MAX_MESSAGES
