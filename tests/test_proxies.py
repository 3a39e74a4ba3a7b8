"""Behind a reverse proxy: whose headers are believed, and where picture URLs lead."""

from __future__ import annotations

import http.client
import http.server
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from sfumato.api.http.urls import check_proxies, check_public_url
from support.inside import DRAW, Inside, running

PREFIX = "/pictures/of-mine"
URL = {**DRAW["json"], "response_format": "url"}


class Proxy(http.server.BaseHTTPRequestHandler):
    """Strips a prefix and says so, as nginx does; what is not below it is 404."""

    protocol_version = "HTTP/1.1"
    url: str
    upstream: int
    """Port of the server behind it."""
    tell: bool

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {"content-type": self.headers.get("content-type") or "text/plain"}
        if self.tell:
            headers |= {
                "X-Forwarded-For": self.client_address[0],
                "X-Forwarded-Proto": "https",
                "X-Forwarded-Host": self.headers["host"],
                "X-Forwarded-Prefix": PREFIX,
            }
        if not self.path.startswith(PREFIX + "/"):
            self.send_error(404)
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.upstream)
        upstream.request(self.command, self.path.removeprefix(PREFIX), body, headers)
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        self.send_response(answer.status)
        for name in ("content-type", "location"):
            if answer.getheader(name):
                self.send_header(name, answer.headers[name])
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = _pass_on

    def log_message(self, *args: object) -> None: ...


@contextmanager
def tls(authority: trustme.CA, *, tell: bool = True) -> Iterator[type[Proxy]]:
    """A TLS proxy with a sub-path; `upstream` is to be set."""
    proxy = type("Proxied", (Proxy,), {"tell": tell})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), proxy) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        proxy.url = f"https://localhost:{server.server_port}{PREFIX}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def client(authority: trustme.CA) -> Iterator[httpx.Client]:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with httpx.Client(verify=context, timeout=30) as client:
        yield client


def test_row_19_a_tls_proxy_with_a_sub_path(tmp_path: Path, authority: trustme.CA, client: httpx.Client) -> None:
    with tls(authority) as proxy, running(Inside(tmp_path)) as proxy.upstream:
        url = client.post(f"{proxy.url}/v1/images/generations", json=URL).json()["data"][0]["url"]
        assert url.startswith(f"{proxy.url}/generated-images/")
        assert client.get(url).content.startswith(b"\x89PNG")


def test_row_19_a_proxy_that_says_nothing(tmp_path: Path, authority: trustme.CA, client: httpx.Client) -> None:
    """Then the setting public_url says it."""
    with (
        tls(authority, tell=False) as proxy,
        running(Inside(tmp_path, public_url=proxy.url + "/")) as proxy.upstream,
    ):
        url = client.post(f"{proxy.url}/v1/images/generations", json=URL).json()["data"][0]["url"]
        assert url.startswith(f"{proxy.url}/generated-images/")
        assert client.get(url).content.startswith(b"\x89PNG")


def test_row_19_a_proxy_that_nobody_trusts(tmp_path: Path, authority: trustme.CA, client: httpx.Client) -> None:
    inside = Inside(tmp_path, trusted_proxies="10.0.0.1")
    with tls(authority) as proxy, running(inside) as proxy.upstream:
        url = client.post(f"{proxy.url}/v1/images/generations", json=URL).json()["data"][0]["url"]
        assert url.startswith(f"http://127.0.0.1:{proxy.upstream}/generated-images/")
        assert inside.engine.seen[0].caller == "127.0.0.1"


def test_docs_and_redirects_below_a_prefix(tmp_path: Path, authority: trustme.CA, client: httpx.Client) -> None:
    with tls(authority) as proxy, running(Inside(tmp_path)) as proxy.upstream:
        for path in ("/", "/docs"):
            page = client.get(f"{proxy.url}{path}", follow_redirects=True)
            assert str(page.url) == f"{proxy.url}{path}"
            links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
            assert len(links) >= 3
            for link in links:
                assert client.get(page.url.join(link)).status_code == 200, link
        assert client.get(f"{proxy.url}/openapi.json").json()["servers"] == [{"url": PREFIX}]
        # A slash too many is mended by a redirect, which has to stay below the prefix.
        assert client.get(f"{proxy.url}/healthz/").headers["location"] == f"{proxy.url}/healthz"


def base(folder: Path, headers: dict[str, str], peer: str = "127.0.0.1", **settings: Any) -> str:
    with Inside(folder, **settings).client((peer, 1)) as client:
        url: str = client.post("/v1/images/generations", json=URL, headers=headers).json()["data"][0]["url"]
    return url.partition("/generated-images/")[0]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, "http://testserver"),
        ({"x-forwarded-proto": "https"}, "https://testserver"),
        ({"x-forwarded-proto": "https, http"}, "https://testserver"),
        ({"x-forwarded-proto": "http, https"}, "http://testserver"),
        ({"x-forwarded-proto": "HTTPS,http,http"}, "https://testserver"),
        ({"x-forwarded-proto": "https, http", "x-forwarded-host": "a.example, b"}, "https://a.example"),
        ({"x-forwarded-port": "8443, 80"}, "http://testserver:8443"),
        ({"x-forwarded-prefix": "/a, /b"}, "http://testserver/a"),
        ({"x-forwarded-host": "a.example"}, "http://a.example"),
        ({"x-forwarded-host": "a.example:81"}, "http://a.example:81"),
        ({"x-forwarded-host": "[2001:db8::1]:81"}, "http://[2001:db8::1]:81"),
        ({"x-forwarded-host": "a.example, b.example"}, "http://a.example"),
        ({"x-forwarded-host": "a.example", "x-forwarded-port": "8443"}, "http://a.example:8443"),
        ({"x-forwarded-host": "a.example:81", "x-forwarded-port": "8443"}, "http://a.example:81"),
        ({"x-forwarded-proto": "https", "x-forwarded-port": "443"}, "https://testserver"),
        ({"x-forwarded-proto": "https", "x-forwarded-port": "80"}, "https://testserver"),
        ({"x-forwarded-port": "70000"}, "http://testserver"),
        ({"x-forwarded-port": "x"}, "http://testserver"),
        ({"x-forwarded-prefix": "/a/b"}, "http://testserver/a/b"),
        ({"x-forwarded-prefix": "/a/"}, "http://testserver/a"),
        ({"x-forwarded-prefix": "/"}, "http://testserver"),
        ({"x-forwarded-prefix": "/v1"}, "http://testserver/v1"),
        ({"x-forwarded-prefix": "a"}, "http://testserver"),
        ({"x-forwarded-prefix": "//evil.example"}, "http://testserver"),
        ({"x-forwarded-prefix": "/a/../b"}, "http://testserver"),
        ({"x-forwarded-prefix": "/a?b"}, "http://testserver"),
        ({"x-forwarded-host": "evil.example/path"}, "http://testserver"),
        ({"x-forwarded-host": 'a"><script>'}, "http://testserver"),
        ({"x-forwarded-host": "user@a.example"}, "http://testserver"),
        ({"x-forwarded-proto": "javascript"}, "http://testserver"),
        ({"host": "b.example:8080"}, "http://b.example:8080"),
        ({"host": "b.example/<evil>"}, "http://testserver:80"),
    ],
)
def test_what_is_forwarded(tmp_path: Path, headers: dict[str, str], expected: str) -> None:
    assert base(tmp_path, headers) == expected


def test_headers_of_proxies_in_a_row_may_be_lines_of_their_own(tmp_path: Path) -> None:
    headers = [("x-forwarded-proto", "https"), ("x-forwarded-proto", "http"), ("x-forwarded-host", "a.example"),
               ("x-forwarded-host", "b")]  # fmt: skip
    with Inside(tmp_path).client(("127.0.0.1", 1)) as client:
        answer = client.post("/v1/images/generations", json=URL, headers=headers)
    assert answer.json()["data"][0]["url"].startswith("https://a.example/")


EVERYTHING = {
    "x-forwarded-proto": "https",
    "x-forwarded-host": "a.example",
    "x-forwarded-port": "8443",
    "x-forwarded-prefix": "/a",
}


@pytest.mark.parametrize(
    ("trusted", "peer", "expected"),
    [
        ("127.0.0.1", "127.0.0.1", "https://a.example:8443/a"),
        ("127.0.0.1", "127.0.0.2", "http://testserver"),
        ("127.0.0.0/8", "127.0.0.2", "https://a.example:8443/a"),
        ("10.0.0.1, 2001:db8::/32", "2001:db8::7", "https://a.example:8443/a"),
        ("*", "203.0.113.7", "https://a.example:8443/a"),
        ("", "127.0.0.1", "http://testserver"),
    ],
)
def test_who_is_believed(tmp_path: Path, trusted: str, peer: str, expected: str) -> None:
    assert base(tmp_path, EVERYTHING, peer, trusted_proxies=trusted) == expected


def test_the_setting_goes_first(tmp_path: Path) -> None:
    assert base(tmp_path, EVERYTHING, public_url="https://set.example/b/") == "https://set.example/b"


@pytest.mark.parametrize("url", ["set.example", "ftp://set.example", "https://", "https://a/?b", "https://a/#b"])
def test_a_public_url_that_is_none(url: str) -> None:
    with pytest.raises(ValueError, match="public_url"):
        check_public_url(url)


@pytest.mark.parametrize("words", ["proxy", "10.0.0.1/8", "127.0.0.1 10.0.0.1", "1.2.3.4:80"])
def test_proxies_that_are_none(words: str) -> None:
    with pytest.raises(ValueError, match="trusted_proxies"):
        check_proxies(words)
