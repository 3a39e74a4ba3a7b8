"""API keys: how they come, who gets in without, and what a refusal says."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.api.http.auth import parse_keys
from sfumato.settings import Settings
from support.inside import DRAW, ELSEWHERE, Inside

ANNA, BERT = "anna-secret-1", "bört-secret-2"
KEYS = f"anna:{ANNA}, bert:{BERT}"


@pytest.fixture
def inside(tmp_path: Path) -> Inside:
    return Inside(tmp_path, api_keys=KEYS)


def basic(user: str, key: str) -> bytes:
    return b"Basic " + base64.b64encode(f"{user}:{key}".encode())


@pytest.mark.parametrize(
    ("header", "value", "caller"),
    [
        ("authorization", f"Bearer {ANNA}".encode(), "anna"),
        ("authorization", f"bearer  {BERT}".encode(), "bert"),
        ("authorization", basic("anna", ANNA), "anna"),
        ("authorization", basic("bert", BERT), "bert"),
        ("x-api-key", ANNA.encode(), "anna"),
        ("authorization", basic("bert", ANNA), None),
        ("authorization", basic("", ANNA), None),
        ("authorization", b"Basic " + base64.b64encode(ANNA.encode()), None),
        ("authorization", b"Basic !!!", None),
        ("authorization", b"Basic \xff", None),
        ("authorization", b"Bearer", None),
        ("authorization", b"Bearer ", None),
        ("authorization", f"Bearer {ANNA[:-1]}".encode(), None),
        ("authorization", f"Bearer {ANNA}x".encode(), None),
        ("authorization", f"Token {ANNA}".encode(), None),
        ("authorization", ANNA.encode(), None),
        ("x-api-key", b"anna", None),
        ("x-api-key", b"", None),
        ("x-other", ANNA.encode(), None),
    ],
)
def test_ways_to_send_a_key(inside: Inside, header: str, value: bytes, caller: str | None) -> None:
    with inside.client() as client:
        answer = client.post("/v1/images/generations", headers={header: value}, **DRAW)
    assert answer.status_code == (200 if caller else 401)
    assert [generation.caller for generation in inside.engine.seen] == ([caller] if caller else [])


def test_one_valid_key_is_enough(inside: Inside) -> None:
    """Some clients always send a Bearer of their own."""
    with inside.client() as client:
        headers = {"authorization": "Bearer unused", "x-api-key": ANNA}
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_a_refusal_says_how_and_shows_nothing(inside: Inside) -> None:
    with inside.client() as client:
        none = client.get("/v1/models")
        wrong = client.get("/v1/models", headers={"authorization": "Bearer guessed-key"})
    for answer in (none, wrong):
        assert answer.status_code == 401
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert "Authorization: Bearer KEY" in error["message"]
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["x-should-retry"] == "false"
        assert answer.headers["x-request-id"]
    assert "guessed-key" not in wrong.text
    assert none.json() != wrong.json()


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/docs", "/openapi.json", "/docs/swagger-ui.css"])
def test_open_without_a_key(inside: Inside, path: str) -> None:
    with inside.client() as client:
        assert client.get(path).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models", "/models", "/metrics", "/v1/images/progress/x", "/nothing", "/healthz/",
        "/healthz/../metrics", "/generated-images", "/v1/images/generations",
    ],
)  # fmt: skip
def test_everything_else_is_closed(inside: Inside, path: str) -> None:
    with inside.client() as client:
        assert client.get(path, follow_redirects=False).status_code == 401
        assert client.get(path, headers={"x-api-key": ANNA}).status_code != 401


def test_every_route_of_the_schema_needs_a_key(inside: Inside) -> None:
    """A new route is closed until somebody opens it."""
    with inside.client() as client:
        schema = client.get("/openapi.json").json()
        closed = 0
        for path, methods in schema["paths"].items():
            for method in methods:
                if path in ("/healthz", "/readyz") or path.startswith("/generated-images/"):
                    continue
                assert client.request(method.upper(), path.replace("{", "").replace("}", "")).status_code == 401
                closed += 1
    assert closed > 5
    assert schema["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"


def test_pictures_are_fetched_without_a_key(inside: Inside) -> None:
    with inside.client() as client:
        body = {**DRAW["json"], "response_format": "url"}
        drawn = client.post("/v1/images/generations", json=body, headers={"x-api-key": ANNA})
        assert client.get(drawn.json()["data"][0]["url"]).content.startswith(b"\x89PNG")
        assert client.get("/generated-images/" + "0" * 32 + ".png").status_code == 404


def test_without_keys_the_address_is_the_caller(tmp_path: Path) -> None:
    inside = Inside(tmp_path)
    with inside.client() as client:
        assert client.post("/v1/images/generations", **DRAW).status_code == 200
    assert inside.engine.seen[0].caller == ELSEWHERE[0]


def test_the_address_is_that_behind_a_trusted_proxy_only(tmp_path: Path) -> None:
    inside = Inside(tmp_path, trusted_proxies="10.0.0.0/8, 192.0.2.1")
    for peer in ("10.1.2.3", "192.0.2.1", "192.0.2.2"):
        with inside.client((peer, 1)) as client:
            client.post("/v1/images/generations", headers={"x-forwarded-for": "198.51.100.9"}, **DRAW)
    assert [generation.caller for generation in inside.engine.seen] == ["198.51.100.9", "198.51.100.9", "192.0.2.2"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s3cret", "entry 1 has no colon"),
        ("a:s3cret,b", "entry 2 has no colon"),
        (":s3cret", "empty name"),
        ("a:", "empty key"),
        ("a:s3cret,,b:other", "entry 2"),
        ("a:s3cret,", "entry 2"),
        ("a:s3cret,a:other", "repeats the name 'a'"),
        ("a:s3cret,b:s3cret", "'b'"),
        ("a:s3cret b:s3cret", "blank"),
    ],
)
def test_keys_that_cannot_be_understood(text: str, words: str) -> None:
    with pytest.raises(ValueError, match="api_keys") as caught:
        parse_keys(text)
    assert words in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_no_keys() -> None:
    assert parse_keys("") == parse_keys("  ") == {}


PART = st.text(st.characters(codec="utf-8", exclude_characters=",:", categories=("L", "N", "P")), min_size=1)


@given(st.dictionaries(PART, PART, min_size=1).filter(lambda keys: len(set(keys.values())) == len(keys)))
def test_what_is_written_is_read(keys: dict[str, str]) -> None:
    assert parse_keys(",".join(f"{name}:{key}" for name, key in keys.items())) == keys


def test_a_key_may_have_a_colon() -> None:
    assert parse_keys("a:b:c") == {"a": "b:c"}


def test_settings_do_not_show_keys() -> None:
    assert ANNA not in repr(Settings(api_keys=KEYS))
