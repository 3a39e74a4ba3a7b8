"""What web pages have browsers send: their own server's pages may all, others nothing; programs are not asked."""

from __future__ import annotations

import base64
import functools
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from sfumato.api.http.cross_site import parse_hosts
from support.inside import DRAW, Inside

EVIL = "https://evil.example"
BASIC = {"authorization": "Basic " + base64.b64encode(b"anna:secret").decode()}
BEARER, X_KEY = {"authorization": "Bearer secret"}, {"x-api-key": "secret"}
Headers = dict[str, str]
Clients = Callable[..., TestClient]

FOREIGN: list[Headers] = [
    {"origin": EVIL},
    {"origin": "null"},
    {"origin": "file://"},
    {"origin": "http://localhost:3000"},
    {"origin": "http://localhost"},
    {"origin": "http://localhost:8080.evil.example"},
    {"origin": "http://localhost:8080@evil.example"},
    {"origin": "chrome-extension://abcdef"},
    {"origin": "nonsense"},
    {"origin": "http://[::1"},
    {"origin": "http://localhost:99999999"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
    {"sec-fetch-site": "something new"},
    {"origin": "http://localhost:8080", "sec-fetch-site": "cross-site"},
    {"origin": EVIL, "sec-fetch-site": "same-origin"},
    # A name of the attacker's that was made to point here.
    {"host": "evil.example:8080", "origin": "http://evil.example:8080"},
    {"host": "evil.example:8080", "sec-fetch-site": "same-origin"},
    {"host": "evil.example:8080", "referer": "http://evil.example:8080/"},
    {"host": "evil.example:8080", "user-agent": "Mozilla/5.0 (X11; Linux x86_64) Firefox/140.0"},
    {"host": "localhost.evil.example", "origin": "http://localhost.evil.example"},
    {"host": "127.0.0.1.evil.example", "origin": "http://127.0.0.1.evil.example"},
    {"host": "evil.example", "origin": "http://evil.example", "x-forwarded-host": "localhost:8080"},
    {"host": "evil.example", "referer": "http://evil.example/", "x-forwarded-host": "localhost:8080"},
    {"host": "evil.example", "referer": "http://evil.example/", "x-forwarded-proto": "https"},
]

OUR_OWN: list[Headers] = [
    {},  # a program
    {"host": "sfumato:8080"},
    {"host": "images.example"},
    {"host": "images.example", "user-agent": "python-httpx/0.28.1"},
    {"origin": "http://localhost:8080", "sec-fetch-site": "same-origin"},
    {"origin": "http://localhost:8080", "user-agent": "Mozilla/5.0"},
    {"sec-fetch-site": "same-origin"},
    {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"},
    {"host": "127.0.0.1:8080", "origin": "http://127.0.0.1:8080"},
    {"host": "[::1]:8080", "origin": "http://[::1]:8080"},
    {"host": "192.168.1.7:8080", "origin": "http://192.168.1.7:8080"},
    {"host": "[::ffff:c0a8:107]", "origin": "http://[::ffff:c0a8:107]", "sec-fetch-site": "same-origin"},
    {"host": "nas:8080", "origin": "http://nas:8080"},
    {"host": "studio.local", "origin": "http://studio.local:80"},
    {"host": "gpu.lan.", "sec-fetch-site": "same-origin"},
    {"host": "app.localhost:8080", "origin": "http://app.localhost:8080"},
]

READ = ("/v1/models", "/models/m", "/v1/images/progress/x", "/sdapi/v1/progress", "/sdapi/v1/options", "/metrics")
OPEN = ("/healthz", "/readyz", "/docs", "/openapi.json", "/docs/swagger-ui.css", "/generated-images/x.png")


@pytest.fixture(scope="module")
def client_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TestClient]]:
    """A client at an address, of a server with these settings; each is made once."""
    with ExitStack() as stack:

        @functools.cache
        def made(address: str = "127.0.0.1", **settings: Any) -> TestClient:
            inside = Inside(tmp_path_factory.mktemp("inside"), **settings)
            return stack.enter_context(inside.client((address, 50000), base_url="http://localhost:8080"))

        yield made


def tried(client: TestClient, headers: Headers) -> dict[str, int]:
    """What may be read, drawn and cancelled → status."""
    answers = {path: client.get(path, headers=headers) for path in READ}
    answers["draw"] = client.post("/v1/images/generations", headers=headers, **DRAW)
    answers["form"] = client.post("/v1/images/generations", headers=headers, data=DRAW["json"])
    answers["a1111"] = client.post("/sdapi/v1/txt2img", headers=headers, json={"prompt": "x"})
    answers["choose"] = client.post("/sdapi/v1/options", headers=headers, json={})
    answers["interrupt"] = client.post("/sdapi/v1/interrupt", headers=headers)
    answers["cancel"] = client.delete("/v1/images/progress/x", headers=headers)
    for answer in answers.values():
        if answer.status_code == 403:
            assert answer.json()["error"]["code"] == "forbidden"
            assert any(name in answer.text for name in ("cors_origins", "allowed_hosts"))
    return {name: answer.status_code for name, answer in answers.items()}


@pytest.mark.parametrize("headers", FOREIGN)
def test_row_20_pages_of_others_may_nothing(client_of: Clients, headers: Headers) -> None:
    client = client_of()
    assert set(tried(client, headers).values()) == {403}
    assert 'sfumato_rejected_total{code="forbidden"}' in client.get("/metrics").text
    for path in OPEN:
        assert client.get(path, headers=headers).status_code in (200, 404), path


@pytest.mark.parametrize("headers", OUR_OWN)
def test_programs_and_the_servers_own_pages_may(client_of: Clients, headers: Headers) -> None:
    client = client_of()
    assert 403 not in tried(client, headers).values()


@pytest.mark.parametrize("headers", FOREIGN)
def test_whoever_wants_it_can_let_all_of_them(client_of: Clients, headers: Headers) -> None:
    client = client_of(cross_site=True)
    assert 403 not in tried(client, headers).values()
    plain = {**headers, "content-type": "text/plain;charset=UTF-8"}
    assert client.post("/v1/images/generations", content=b'{"prompt": "x"}', headers=plain).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "Text/Plain; charset=utf-8", " text/plain"])
def test_text_that_pages_send_without_asking_is_not_read(client_of: Clients, kind: str) -> None:
    client = client_of()
    for path in ("/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/options", "/sdapi/v1/interrupt"):
        answer = client.post(path, content=b'{"prompt": "x"}', headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("settings", "headers"),
    [
        ({"cors_origins": EVIL}, {"origin": EVIL, "sec-fetch-site": "cross-site"}),
        ({"cors_origins": "*"}, {"origin": EVIL, "sec-fetch-site": "cross-site"}),
        ({"allowed_hosts": "evil.example"}, {"host": "evil.example:8080", "origin": "http://evil.example:8080"}),
        ({"allowed_hosts": "a, *.example"}, {"host": "evil.example:8080", "sec-fetch-site": "same-origin"}),
        ({"allowed_hosts": "*"}, {"host": "evil.example:8080", "origin": "http://evil.example:8080"}),
        ({"public_url": "https://images.example/x"}, {"host": "images.example", "origin": "https://images.example"}),
        ({"public_url": "https://images.example/x"}, {"host": "127.0.0.1:8080", "origin": "https://images.example"}),
        # A proxy that says what the browser asked for, by https: no page can forge Sec-Fetch-Site.
        ({}, {"host": "images.example", "x-forwarded-proto": "https", "origin": "https://images.example",
              "sec-fetch-site": "same-origin"}),
        ({}, {"host": "127.0.0.1:8080", "x-forwarded-proto": "https", "x-forwarded-host": "images.example",
              "origin": "https://images.example"}),
        ({}, {"host": socket.gethostname(), "sec-fetch-site": "same-origin"}),
    ],
)  # fmt: skip
def test_pages_that_the_settings_name_may(client_of: Clients, settings: dict[str, Any], headers: Headers) -> None:
    client = client_of(**settings)
    assert 403 not in tried(client, headers).values()


@pytest.mark.parametrize(
    ("settings", "headers"),
    [
        ({"cors_origins": "https://app.example"}, {"origin": EVIL}),
        ({"cors_origins": "https://evil.example:8443"}, {"origin": EVIL}),
        ({"allowed_hosts": "example"}, {"host": "evil.example", "origin": "http://evil.example"}),
        ({"allowed_hosts": "*.evil.example"}, {"host": "evil.example", "origin": "http://evil.example"}),
        ({"public_url": "https://images.example"}, {"origin": EVIL}),
    ],
)
def test_and_no_others(client_of: Clients, settings: dict[str, Any], headers: Headers) -> None:
    client = client_of(**settings)
    assert set(tried(client, headers).values()) == {403}


def test_a_proxy_that_is_not_trusted_vouches_for_nobody(client_of: Clients) -> None:
    headers = {"host": "evil.example", "x-forwarded-proto": "https", "sec-fetch-site": "same-origin"}
    client = client_of("203.0.113.7")
    assert set(tried(client, headers).values()) == {403}


@pytest.mark.parametrize("headers", FOREIGN)
def test_with_keys_a_page_may_what_its_key_may_and_a_browsers_password_is_none(
    client_of: Clients, headers: Headers
) -> None:
    client = client_of(api_keys="anna:secret")
    assert set(tried(client, headers).values()) == {401}
    assert set(tried(client, headers | BASIC).values()) == {403}
    for key in (BEARER, X_KEY):
        assert not {401, 403} & set(tried(client, headers | key).values())
    client = client_of()
    assert set(tried(client, headers | BEARER).values()) == {403}


@pytest.mark.parametrize("hosts", ["a b", "http://x", "x:8080", "*.", "a,*b"])
def test_names_that_are_none(tmp_path: Path, hosts: str) -> None:
    with pytest.raises(ValueError, match="allowed_hosts"):
        Inside(tmp_path, allowed_hosts=hosts)
    assert parse_hosts(" A.example ,*.b,") == ["a.example", "*.b"]
