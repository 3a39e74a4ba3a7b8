"""Bodies that are small on the wire and large to build, or said to be what they are not: refused, and cheaply."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from sfumato.api.http import body_cost, content_type, multipart
from sfumato.errors import InvalidRequest, RequestTooLarge, UnsupportedMedia
from support.answerable import answerable, memory_mb, threads, within
from support.inside import Inside
from support.serving import Server

JSON, URLENCODED = "application/json", "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=B"
GENERATIONS = "/v1/images/generations"
MB = 2**20


def part(headers: str, data: bytes = b"x") -> bytes:
    return b"--B\r\n" + headers.encode() + b"\r\n\r\n" + data + b"\r\n"


def field(name: str, data: bytes = b"x") -> bytes:
    return part(f'content-disposition: form-data; name="{name}"', data)


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--B--\r\n"


LARGE: dict[str, tuple[str, Callable[[], bytes], set[int]]] = {
    "empty texts in a list": (JSON, lambda: b'{"prompt": [' + b'"", ' * (8 * MB) + b'""]}', {400, 413}),
    "zeros in a list": (JSON, lambda: b'{"prompt": [' + b"0," * (15 * MB) + b"0]}", {400, 413}),
    "lists in a list": (JSON, lambda: b'{"prompt": [' + b"[]," * (10 * MB) + b"0]}", {400, 413}),
    "many keys": (JSON, lambda: b"{" + b"".join(b'"%d":0,' % i for i in range(2 * MB)) + b'"a":0}', {400, 413}),
    "the same key": (JSON, lambda: b"{" + b'"a":0,' * (5 * MB) + b'"a":0}', {400, 413}),
    "deep lists": (JSON, lambda: b'{"prompt": ' + b"[" * (30 * MB), {400, 413}),
    "deep objects": (JSON, lambda: b'{"a":' * (6 * MB), {400, 413}),
    "a number without end": (JSON, lambda: b'{"prompt": "x", "seed": ' + b"9" * (10 * MB) + b"}", {400, 413}),
    "a fraction without end": (JSON, lambda: b'{"prompt": "x", "seed": 0.' + b"9" * (200 * 1024) + b"}", {400}),
    "blanks": (JSON, lambda: b"{" + b" " * (30 * MB) + b'"prompt": 1}', {400, 413}),
    "escapes": (JSON, lambda: b'{"prompt": "' + rb"\u0000" * (5 * MB) + b'"}', {413}),
    "escaped quotes": (JSON, lambda: b'{"prompt": "' + rb"\"" * (15 * MB) + b'"}', {400, 413}),
    "backslashes": (JSON, lambda: b'{"prompt": "' + rb"\\" * (15 * MB) + b'"}', {413}),
    "a text without end": (JSON, lambda: b'{"prompt": "' + b"x" * (30 * MB), {400}),
    "an endless prompt": (JSON, lambda: b'{"prompt": "' + b"a cat. " * (4 * MB) + b'"}', {413}),
    "quotes": (JSON, lambda: b'"' * (30 * MB), {400}),
    "ampersands": (URLENCODED, lambda: b"&" * (8 * MB), {400}),
    "fields": (URLENCODED, lambda: b"a=a&" * (5 * MB), {400}),
    "semicolons": (URLENCODED, lambda: b";a=a" * (5 * MB), {400, 413}),
    "percents": (URLENCODED, lambda: b"prompt=" + b"%41" * (10 * MB), {413}),
    "percents of a picture": (URLENCODED, lambda: b"image=" + b"%2B" * (10 * MB), {413}),
    "plus signs": (URLENCODED, lambda: b"prompt=" + b"+" * (30 * MB), {400}),
    "JSON in disguise": (URLENCODED, lambda: b'{"prompt": [' + b'"",' * (8 * MB) + b'""]}', {400, 413}),
    "parts": (MULTIPART, lambda: form(*[field("a")] * 500_000), {400}),
    "files": (MULTIPART, lambda: form(*[part('content-disposition: form-data; name="a"; filename="b"')] * 70), {400}),
    "false boundaries": (MULTIPART, lambda: form(field("prompt", b"\r\n--Bx" * (4 * MB))), {400}),
    "blanks behind a boundary": (MULTIPART, lambda: b"--B" + b" " * (30 * MB) + b"\r\n", {400}),
    "a long preamble": (MULTIPART, lambda: b"\r\n" * (15 * MB) + form(field("n", b"0"), field("prompt")), {400}),
    "a long epilogue": (MULTIPART, lambda: form(field("n", b"0"), field("prompt")) + b"\r\n" * (15 * MB), {400}),
    "headers of a part": (
        MULTIPART,
        lambda: form(part("\r\n".join(f"x-{i}: y" for i in range(500_000)) + "\r\ncontent-disposition: form-data")),
        {400},
    ),
    "a long header of a part": (MULTIPART, lambda: form(part(f"x: {'y' * 10 * MB}")), {400}),
    "a long text": (MULTIPART, lambda: form(field("prompt", b"a cat. " * (4 * MB))), {413}),
    "carriage returns": (MULTIPART, lambda: form(field("prompt", b"\r" * (30 * MB))), {400, 413}),
    "punycode": (f"{MULTIPART}; charset=utf-8; charset=punycode", lambda: form(field("prompt", b"a-" * MB)), {415}),
}
"""What → content type, body, what it may be answered."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("bodies")
    with Server(folder, folder / "data") as server:
        assert server.draw(prompt="a cat", steps=1, n=2).status_code == 200
        yield server


@pytest.mark.slow
def test_row_17_large_by_count_is_refused_while_others_are_answered(server: Server) -> None:
    before, many = memory_mb(server.pid), threads(server.pid)
    with answerable(server.url, server.pid):
        for name, (kind, body, statuses) in LARGE.items():
            answer = httpx.post(server.url + GENERATIONS, content=body(), headers={"content-type": kind}, timeout=60)
            assert answer.status_code in statuses, (name, answer.text)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    within(120, lambda: memory_mb(server.pid) < before + 100)
    assert threads(server.pid) <= many + 2


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with Inside(tmp_path_factory.mktemp("inside")).client() as client:
        yield client


@pytest.mark.parametrize("name", LARGE)
def test_no_large_body_costs_a_second(client: TestClient, name: str) -> None:
    kind, make, statuses = LARGE[name]
    body = make()
    began = time.process_time()
    answer = client.post(GENERATIONS, content=body, headers={"content-type": kind})
    assert time.process_time() - began < 1.5  # of which the client takes some
    assert answer.status_code in statuses, answer.text


def post(client: TestClient, kind: str, body: bytes, path: str = GENERATIONS) -> Any:
    answer = client.post(path, content=body, headers={"content-type": kind} if kind else {})
    error = answer.json().get("error", {"message": ""})
    return answer.status_code, error["message"]


PROMPT = '{"prompt": "Grüße"}'.encode()
GOOD = form(field("prompt", "Grüße".encode()))
ODD = (
    "idna",
    "punycode",
    "unicode_escape",
    "raw_unicode_escape",
    "utf-7",
    "hz",
    "utf-16",
    "base64",
    "zip",
    "nothing",
    "",
)


@pytest.mark.parametrize("charset", ODD)
@pytest.mark.parametrize("kind", [JSON, URLENCODED, MULTIPART])
def test_row_16_odd_charsets_are_refused_by_name(client: TestClient, kind: str, charset: str) -> None:
    for said in (f"{kind}; charset={charset}", f'{kind}; CHARSET = "{charset}"', f"{kind};;charset={charset} ;"):
        status, message = post(client, said, b"a-" * MB)
        assert status == 415
        assert repr(charset) in message
    for said in (f"{kind}; charset=utf-8; charset={charset}", f"{kind}; charset={charset}; charset=utf-8"):
        assert post(client, said, b"a-" * MB) == (415, f"content-type: charset occurs twice in {said!r}")


@pytest.mark.parametrize(
    "headers",
    [
        'content-disposition: form-data; name="prompt"\r\ncontent-type: text/plain; charset=punycode',
        'content-disposition: form-data; name="prompt"\r\ncontent-type: text/plain; charset=utf-8; charset=idna',
        'content-disposition: form-data; name="prompt"\r\ncontent-transfer-encoding: base64',
        'content-disposition: form-data; name="prompt"\r\ncontent-transfer-encoding: quoted-printable',
        'content-disposition: form-data; name="prompt"\r\ncontent-type: multipart/mixed; boundary=C',
        'content-disposition: form-data; name="prompt"; name="image"',
        'content-disposition: form-data; name="_charset_"',
    ],
)
def test_row_16_so_are_those_of_a_part(client: TestClient, headers: str) -> None:
    status, message = post(client, MULTIPART, form(part(headers, b"utf-7"), field("prompt")))
    assert status == 415, message


@pytest.mark.parametrize(
    "headers",
    [
        "x: y",
        "content-disposition: form-data",
        'content-disposition: attachment; name="prompt"',
        'content-disposition: form-data; name="prompt"\r\ncontent-disposition: form-data; name="image"',
        "content-disposition: form-data; name*=utf-7''prompt",
    ],
)
def test_parts_that_say_no_name_are_refused(client: TestClient, headers: str) -> None:
    status, message = post(client, MULTIPART, form(part(headers)))
    assert status == 400, message
    assert "form" in message


@pytest.mark.parametrize("boundary", ["", '""', "B" * 300, '"B "', "\xff", "B; boundary=C", "x"])
def test_boundaries_that_are_none(client: TestClient, boundary: str) -> None:
    answer = client.post(
        GENERATIONS,
        content=GOOD,
        headers={b"content-type": b"multipart/form-data; boundary=" + boundary.encode("latin-1")},
    )
    assert answer.status_code in (400, 415), answer.text


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("", PROMPT),
        (JSON, PROMPT),
        (JSON, b"\xef\xbb\xbf" + PROMPT),  # as Windows' editors save a file
        (URLENCODED, b"\xef\xbb\xbf" + PROMPT),
        ("Application/JSON ; Charset=UTF-8", PROMPT),
        ("application/vnd.api+json", PROMPT),
        (f"{JSON}; charset=iso-8859-1", '{"prompt": "Grüße"}'.encode("latin-1")),
        (URLENCODED, PROMPT),
        (URLENCODED, b"prompt=Gr%C3%BC%C3%9Fe&model=m"),
        (f"{URLENCODED}; charset=utf-8", b"prompt=Gr%C3%BC%C3%9Fe"),
        (f"{URLENCODED}; charset=latin-1", b"prompt=Gr%FC%DFe"),
        (MULTIPART, GOOD),
        ('multipart/form-data; boundary="B"', GOOD),
        (f"{MULTIPART}; charset=utf-8", GOOD),
        (f"{MULTIPART}; charset=iso-8859-1", form(field("prompt", "Grüße".encode("latin-1")))),
        (MULTIPART, form(field("prompt", "Grüße".encode("latin-1")))),
        (MULTIPART, form(field("_charset_", b"UTF-8"), field("prompt", "Grüße".encode()))),
        (
            MULTIPART,
            form(part('Content-Disposition: form-data; name="prompt"\r\nContent-Type: text/plain; charset=utf-8\r\n'
                      "Content-Transfer-Encoding: 8bit", "Grüße".encode())),
        ),
    ],
)  # fmt: skip
def test_what_clients_really_send_is_read(tmp_path: Path, kind: str, body: bytes) -> None:
    inside = Inside(tmp_path)
    with inside.client() as client:
        assert post(client, kind, body)[0] == 200
    assert inside.engine.seen[0].prompt == "Grüße"


@pytest.mark.parametrize("kind", ["application/octet-stream", "text/html", "image/png", "nonsense", "a/b; c", "/"])
def test_other_kinds_of_bodies_are_refused(client: TestClient, kind: str) -> None:
    assert post(client, kind, PROMPT)[0] == 415


@pytest.mark.parametrize("path", ["/sdapi/v1/options", "/sdapi/v1/txt2img", "/sdapi/v1/png-info", "/v1/images/edits"])
def test_every_route_reads_its_body_the_same_way(client: TestClient, path: str) -> None:
    for name in ("empty texts in a list", "deep lists", "ampersands", "percents", "parts", "punycode"):
        kind, make, _ = LARGE[name]
        assert post(client, kind, make(), path)[0] in (400, 413, 415)


def test_pictures_are_no_text(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.effect_noise((2400, 2400), 100).save(file, "PNG")
    picture = base64.b64encode(file.getvalue())
    assert len(picture) > 5 * MB
    uri = b"data:image/png;base64," + picture
    body_cost.check_json(b'{"image": "%s"}' % uri, 4 * MB)
    body_cost.check_json(b'{"image": "%s"}' % uri.replace(b"/", rb"\/"), 4 * MB)  # as PHP writes it
    body_cost.check_urlencoded(
        b"image=" + picture.replace(b"+", b"%2B").replace(b"/", b"%2F").replace(b"=", b"%3D"), 4 * MB
    )
    inside = Inside(tmp_path)
    with inside.client() as client:
        assert (
            client.post("/v1/images/edits", json={"prompt": "x", "size": "64x64", "image": uri.decode()}).status_code
            == 200
        )
        assert (
            client.post("/v1/images/edits", data={"prompt": "x", "size": "64x64", "image": uri.decode()}).status_code
            == 200
        )
        assert (
            client.post(
                "/v1/images/edits", data={"prompt": "x", "size": "64x64"}, files={"image": file.getvalue()}
            ).status_code
            == 200
        )
    with pytest.raises(RequestTooLarge, match="max_text_mb"):
        body_cost.check_json(json.dumps({"prompt": "a cat " * MB}).encode(), 4 * MB)


def test_quotes_and_backslashes_are_counted_as_json_means_them() -> None:
    for text in ('"', '\\"', '\\\\"', "a\\", "\\\\", 'x"' * 100, "\u0000\n\t", "{[,:"):
        body = json.dumps({"a": [text] * 3, text: {"b": text}}).encode()
        body_cost.check_json(body, MB)
    for strings in (body_cost.MAX_STRINGS - 1, body_cost.MAX_STRINGS + 2):
        body = b"[" + b",".join([b'"a"'] * strings) + b"]"
        if strings <= body_cost.MAX_STRINGS:
            body_cost.check_json(body, MB)
        else:
            with pytest.raises(InvalidRequest, match="texts"):
                body_cost.check_json(body, MB)


def test_media_types() -> None:
    assert content_type.parse("").type == ""
    assert content_type.parse('Text/X; a="b;\\"c"; D=e ;').parameters == {"a": 'b;"c', "d": "e"}
    for wrong in ("a/b c", "a/b; =c", 'a/b; c="d', "a/b; c=d; C=e", ";" * 9000 + "=", "a/b;" + " " * 9000 + '"'):
        with pytest.raises(UnsupportedMedia):
            content_type.parse(wrong)


def test_a_form_that_breaks_off_is_refused() -> None:
    said = content_type.parse(MULTIPART)
    whole = form(field("prompt", b"a cat"))
    assert multipart.parts(whole, said, MB) == [("prompt", "a cat")]
    for length in range(whole.index(b"--B--") + 4):
        with pytest.raises(InvalidRequest):
            multipart.parts(whole[:length], said, MB)


def test_an_application_may_start_again(tmp_path: Path) -> None:
    inside = Inside(tmp_path)
    for _ in range(2):
        with inside.client() as client:
            assert post(client, JSON, PROMPT)[0] == 200
