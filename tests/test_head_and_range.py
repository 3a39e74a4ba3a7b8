"""HEAD on whatever can be got, and parts of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from support.inside import Inside

DATA = bytes(range(100))
READ = (
    "/", "/healthz", "/readyz", "/v1/models", "/v1/models/m", "/models", "/sdapi/v1/progress", "/sdapi/v1/options",
    "/docs", "/docs/favicon.png", "/openapi.json", "/generated-images/no-such.png", "/nothing",
    "/v1/images/generations",
)  # fmt: skip


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Inside:
    return Inside(tmp_path_factory.mktemp("inside"))


@pytest.fixture(scope="module")
def client(inside: Inside) -> Iterator[TestClient]:
    with inside.client(follow_redirects=False) as client:
        yield client


@pytest.fixture(scope="module")
def picture(inside: Inside) -> str:
    return f"/generated-images/{inside.store.put(DATA, 'webp')}"


@pytest.mark.parametrize("path", READ)
def test_head_says_what_get_would(client: TestClient, path: str) -> None:
    got, head = client.get(path), client.head(path)
    assert head.content == b""
    assert head.status_code == got.status_code
    changing = ("x-request-id",)
    assert {**head.headers, **dict.fromkeys(changing)} == {**got.headers, **dict.fromkeys(changing)}


def test_head_is_counted_as_what_it_is(client: TestClient) -> None:
    client.head("/healthz")
    metrics = client.get("/metrics").text
    assert 'sfumato_http_requests_total{method="HEAD",route="/healthz",status="200"}' in metrics
    assert client.head("/metrics").headers["content-length"]


def test_head_of_a_picture(client: TestClient, picture: str) -> None:
    head = client.head(picture)
    assert (head.status_code, head.content) == (200, b"")
    assert (head.headers["content-length"], head.headers["content-type"]) == ("100", "image/webp")
    assert head.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=90-", 90, 100),
        ("bytes=-10", 90, 100),
        ("bytes=-1000", 0, 100),
        ("bytes=90-1000", 90, 100),
        ("Bytes = 5 - 6", 5, 7),
    ],
)
def test_parts_of_a_picture(client: TestClient, picture: str, asked: str, start: int, end: int) -> None:
    for method in ("GET", "HEAD"):
        answer = client.request(method, picture, headers={"range": asked})
        assert answer.status_code == 206
        assert answer.content == (DATA[start:end] if method == "GET" else b"")
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/100"
        assert answer.headers["content-length"] == str(end - start)


@pytest.mark.parametrize("asked", ["bytes=100-", "bytes=100-200", "bytes=-0"])
def test_parts_that_it_has_not(client: TestClient, picture: str, asked: str) -> None:
    answer = client.get(picture, headers={"range": asked})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == "bytes */100"
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "asked", ["lines=0-5", "bytes=0-1,5-6", "bytes=", "bytes=-", "bytes=9-5", "nonsense", "bytes=" + "9" * 5000 + "-"]
)
def test_what_is_no_range_is_ignored(client: TestClient, picture: str, asked: str) -> None:
    answer = client.get(picture, headers={"range": asked})
    assert (answer.status_code, answer.content) == (200, DATA)


def test_what_the_client_has_is_not_sent_again(client: TestClient, picture: str) -> None:
    etag = client.get(picture).headers["etag"]
    for known in (etag, f'"x", {etag}', f"W/{etag}", "*"):
        answer = client.get(picture, headers={"if-none-match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert client.get(picture, headers={"if-none-match": '"x"'}).status_code == 200
    part = {"range": "bytes=0-9"}
    assert client.get(picture, headers=part | {"if-range": etag}).status_code == 206
    assert client.get(picture, headers=part | {"if-range": '"x"'}).status_code == 200


def test_a_picture_that_has_expired_is_not_there(inside: Inside, client: TestClient, tmp_path: Path) -> None:
    name = inside.store.put(DATA, "png")
    (inside.store.folder / name).unlink()
    for method in ("GET", "HEAD"):
        assert client.request(method, f"/generated-images/{name}", headers={"range": "bytes=0-1"}).status_code == 404
