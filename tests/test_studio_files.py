"""The studio's files: as they came from npm, small, nobody else's, and served so that nothing foreign can run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import sfumato
from support.inside import Inside

WEB = Path(sfumato.__file__).parent / "web"
VENDOR = WEB / "vendor"
OURS = sorted(path for path in WEB.rglob("*") if path.is_file() and VENDOR not in path.parents)
SERVED = sorted(path for path in WEB.rglob("*") if path.suffix in (".html", ".css", ".js", ".mjs", ".svg"))

MAX_LINES = 250
MAX_BYTES = 150_000


def test_what_is_vendored_is_as_it_came() -> None:
    manifest = json.loads((VENDOR / "manifest.json").read_text())
    listed = {name: about["sha256"] for package in manifest for name, about in package["files"].items()}
    there = {
        path.relative_to(VENDOR).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in VENDOR.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert there == listed
    assert all(package["version"] and package["licence"] for package in manifest)


def test_no_module_is_long() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in OURS if path.suffix == ".js"}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
    assert len(lengths) > 10


def test_the_page_is_light() -> None:
    assert sum(path.stat().st_size for path in SERVED) < MAX_BYTES


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_nothing_is_fetched_from_elsewhere_and_nothing_is_html(path: Path) -> None:
    text = path.read_text()
    for url in re.findall(r"https?://[^\s\"'`)]+", text):
        assert url == "http://www.w3.org/2000/svg", url
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "unsafeHTML", "document.write", "eval(", "srcdoc"):
        assert danger not in text
    if path.suffix == ".html":
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", text)


def test_every_module_is_reached_and_imports_what_there_is() -> None:
    seen: set[Path] = set()
    open_ = [WEB / "js" / "main.js"]
    while open_:
        path = open_.pop()
        if path in seen:
            continue
        seen.add(path)
        open_ += [
            (path.parent / name).resolve()
            for name in re.findall(r"^(?:import|export)[^;]*? from \"(\.[^\"]+)\"", path.read_text(), re.M)
        ]
    assert {path.name for path in WEB.joinpath("js").glob("*.js")} - {path.name for path in seen} == set()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with Inside(tmp_path, api_keys="someone:the-key").client() as client:
        yield client


def test_the_page_needs_no_key_and_lets_nothing_foreign_run(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-frame-options"] == "DENY"
    assert client.head("/").status_code == 200


@pytest.mark.parametrize("path", SERVED, ids=lambda path: path.name)
def test_each_file_is_served_with_its_type_and_asked_for_again(client: TestClient, path: Path) -> None:
    where = f"/studio/{path.relative_to(WEB).as_posix()}"
    answer = client.get(where)
    assert answer.status_code == 200
    assert answer.content == path.read_bytes()
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "'self'" in answer.headers["content-security-policy"]
    if path.suffix in (".js", ".mjs"):
        assert answer.headers["content-type"].split(";")[0] in ("text/javascript", "application/javascript")
    again = client.get(where, headers={"if-none-match": answer.headers["etag"]})
    assert again.status_code == 304


@pytest.mark.parametrize(
    "path", ["/studio/../api/app.py", "/studio/%2e%2e/cli.py", "/studio//etc/passwd", "/studio/js/"]
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (401, 404)


@pytest.mark.parametrize("path", ["/healthz", "/docs", "/nothing", "/v1/models", "/generated-images/x.png"])
def test_every_answer_is_safe_to_open(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
