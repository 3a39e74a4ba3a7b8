"""What servers of picture URLs may answer, and names that never resolve: none of it costs more than it may."""

from __future__ import annotations

import asyncio
import gzip
import os
import socket
import ssl
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import certifi
import httpx
import pytest
import trustme

from sfumato.errors import InvalidPicture
from sfumato.pictures import fetch
from sfumato.pictures.fetch import PictureFetcher
from sfumato.pictures.resolving import Resolver, Unresolved
from support.answerable import answerable, within
from support.inside import DRAW, Inside, running
from support.sites import PICTURE, DeadNames, Elsewhere, Site

BOMB = gzip.compress(gzip.compress(gzip.compress(bytes(200 * 2**20), 9), 9), 9)
"""Some hundred bytes that are 200 MiB."""


def endless(handler: Elsewhere) -> None:
    handler.say(200)
    while True:
        handler.wfile.write(bytes(2**20))


def chunked(size: bytes, extension: bytes = b"") -> Callable[[Elsewhere], None]:
    def answer(handler: Elsewhere) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.say(200, transfer_encoding="chunked")
        while True:
            handler.wfile.write(size + extension + b"\r\n" + bytes(int(size, 16)) + b"\r\n")

    return answer


def redirect_with_a_body(**headers: str) -> Callable[[Elsewhere], None]:
    """The picture is behind it."""

    def answer(handler: Elsewhere) -> None:
        if handler.path == "/behind":
            handler.say(200, PICTURE, content_length=str(len(PICTURE)))
            return
        handler.say(302, location="/behind", set_cookie="a=b; path=/", **headers)
        handler.wfile.write(BOMB if headers else b"")
        while not headers:
            handler.wfile.write(bytes(2**20))

    return answer


ENCODINGS = ("gzip", "gzip, gzip, gzip", "deflate", "br", "zstd", "GZIP", "x-gzip", "nonsense", "identity, gzip")


def encoded(encoding: str) -> Callable[[Elsewhere], None]:
    return lambda handler: handler.say(200, BOMB, content_encoding=encoding)


REFUSED: dict[str, tuple[Callable[[Elsewhere], None], str]] = {
    **{f"encoded-{encoding}": (encoded(encoding), "content-encoding") for encoding in ENCODINGS},
    "declared": (lambda h: h.say(200, content_length=str(2**40)), "larger than 32 MiB"),
    "declared-very": (lambda h: h.say(200, content_length="9" * 18), "larger than 32 MiB"),
    "endless": (endless, "larger than 32 MiB"),
    "chunked": (chunked(b"100000"), "larger than 32 MiB"),
    "chunk-extensions": (chunked(b"1", b";" + b"x" * 200_000), "could not be fetched"),
    "headers": (lambda h: h.say(200, **{f"x_{i}": "y" * 1000 for i in range(1000)}), "could not be fetched"),
    "long-header": (lambda h: h.say(200, x="y" * 10**7), "could not be fetched"),
    "not-found": (lambda h: h.say(404, BOMB, content_encoding="gzip"), "404"),
    "not-http": (lambda h: h.wfile.write(b"\0" * 10**6), "could not be fetched"),
    "nowhere": (lambda h: h.say(302, location="http://"), "could not be fetched"),
    "for-ever": (lambda h: h.say(302, location="/picture"), "redirects"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_row_14_what_is_not_taken(name: str) -> None:
    """With words, and without more memory than the cap."""
    answer, words = REFUSED[name]
    tracemalloc.start()
    try:
        with Site(answer) as site, pytest.raises(InvalidPicture) as caught:
            site.fetched()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.param == "image"
    assert words in caught.value.message
    assert site.url in caught.value.message
    assert peak < 1.3 * fetch.MAX_BYTES
    assert {seen["accept-encoding"] for seen in site.seen} == {"identity"}


@pytest.mark.parametrize("headers", [{}, {"content_encoding": "gzip, gzip, gzip"}])
def test_row_14_the_body_of_a_redirect_is_not_read(headers: dict[str, str]) -> None:
    tracemalloc.start()
    try:
        with Site(redirect_with_a_body(**headers)) as site:
            assert site.fetched() == PICTURE
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    assert [seen.get("cookie") for seen in site.seen] == [None, None]


@pytest.mark.parametrize("headers", [{}, {"content_encoding": "identity"}, {"content_length": str(len(PICTURE))}])
def test_row_14_what_is_taken(headers: dict[str, str]) -> None:
    taken: list[int] = []
    with Site(lambda h: h.say(200, PICTURE, **headers)) as site:
        assert site.fetched(taken.append) == PICTURE
    assert sum(taken) == len(PICTURE)


def test_row_14_it_is_told_of_every_piece_before_it_is_kept() -> None:
    class Full(Exception): ...

    taken = 0

    def take(count: int) -> None:
        nonlocal taken
        taken += count
        if taken > 2**20:
            raise Full

    with Site(endless) as site, pytest.raises(Full):
        site.fetched(take)
    assert taken < 2**21


@pytest.mark.parametrize("part", ["headers", "body"])
def test_row_14_a_slow_answer_ends(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """However little comes however often."""
    monkeypatch.setattr(fetch, "TIMEOUT_S", 1.0)
    over = threading.Event()

    def drip(handler: Elsewhere) -> None:
        if part == "body":
            handler.say(200)
        while not over.wait(0.05):
            handler.wfile.write(b"x: y\r\n" if part == "headers" else b"x")

    with Site(drip) as site, pytest.raises(InvalidPicture, match="longer than 1 s"):
        try:
            site.fetched()
        finally:
            over.set()


# Names.


@pytest.fixture
def dead() -> Iterator[DeadNames]:
    names = DeadNames()
    yield names
    names.over.set()


def test_row_24_dead_names_hold_up_nobody_else(tmp_path: Path, dead: DeadNames) -> None:
    inside = Inside(tmp_path, picture_hosts="alive")
    threads = threading.active_count()
    with Site(lambda h: h.say(200, PICTURE)) as site, running(inside) as port:
        inside.service.fetcher = PictureFetcher(["alive"], Resolver(dead, wait_s=600))
        url = f"http://127.0.0.1:{port}"
        draw = f"{url}/v1/images/generations"
        with answerable(url, os.getpid()):
            clients = [httpx.Client(timeout=300) for _ in range(36)]
            with ThreadPoolExecutor(36) as pool:
                waiting = [
                    pool.submit(client.post, draw, json=DRAW["json"] | {"image": f"http://dead{i}.example/x"})
                    for i, client in enumerate(clients)
                ]
                within(120, lambda: inside.service.queue.waiting == 36)
                within(120, lambda: dead.asked == 32)
                # A plain request is drawn although all places for lookups are taken.
                assert httpx.post(draw, **DRAW, timeout=60).status_code == 200
                assert inside.service.queue.waiting == 36
                dead.over.set()
                answers = [each.result() for each in waiting]
            for client in clients:
                client.close()
        assert {answer.status_code for answer in answers} == {400}
        assert all("does not resolve" in answer.json()["error"]["message"] for answer in answers)
        alive = DRAW["json"] | {"image": site.url.replace("127.0.0.1", "alive")}
        assert httpx.post(draw, json=alive, timeout=60).status_code == 200
    within(120, lambda: threading.active_count() <= threads)


def test_row_24_a_lookup_ends_with_its_client_and_its_time(dead: DeadNames) -> None:
    async def run() -> None:
        resolver = Resolver(dead, wait_s=0.5, lookups=2)
        lookups = [asyncio.create_task(resolver.address(f"dead{i}", 80)) for i in range(2)]
        await asyncio.to_thread(within, 120, lambda: dead.asked == 2)
        lookups[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await lookups[0]
        for name in ("dead", "alive"):  # both threads are taken still
            with pytest.raises(Unresolved, match=r"not resolved within 0.5 s"):
                await resolver.address(name, 80)
        with pytest.raises(Unresolved):
            await lookups[1]
        assert dead.asked == 2
        dead.over.set()
        while True:
            try:
                assert await resolver.address("alive", 80) == "127.0.0.1"
                return
            except Unresolved:
                continue

    asyncio.run(run())


def test_row_24_what_is_wrong_with_a_name_is_told() -> None:
    async def run() -> None:
        with pytest.raises(Unresolved, match="does not resolve"):
            await Resolver().address("no-such-host.invalid", 80)
        with pytest.raises(Unresolved, match="does not resolve"):
            await Resolver().address("a" * 300 + ".example", 80)
        assert await Resolver().address("127.0.0.1", 80) == "127.0.0.1"

    asyncio.run(run())


@pytest.mark.parametrize("certified", ["pictures.example", "other.example"])
def test_a_name_stays_a_name_where_its_address_is_connected_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, certified: str
) -> None:
    """For the `Host` that the server reads, the name that it is greeted with, and the certificate it has to have."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setattr(certifi, "where", lambda: str(tmp_path / "ca.pem"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(certified).configure_cert(tls)
    greeted: list[str | None] = []
    tls.sni_callback = lambda _socket, name, _context: greeted.append(name)
    asked: list[tuple[str, int]] = []

    def lookup(host: str, port: int, **more: Any) -> list[tuple[Any, ...]]:
        asked.append((host, port))
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    async def fetched(site: Site) -> bytes:
        fetcher = PictureFetcher(["pictures.example"], Resolver(lookup))
        try:
            return await fetcher.get(f"https://pictures.example:{site.port}/picture", "image")
        finally:
            await fetcher.close()

    with Site(lambda h: h.say(200, PICTURE), tls) as site:
        if certified == "pictures.example":
            assert asyncio.run(fetched(site)) == PICTURE
            assert [seen["host"] for seen in site.seen] == [f"pictures.example:{site.port}"]
        else:
            with pytest.raises(InvalidPicture, match="CERTIFICATE_VERIFY_FAILED"):
                asyncio.run(fetched(site))
            assert site.seen == []
    assert greeted == ["pictures.example"]
    assert asked == [("pictures.example", site.port)]
