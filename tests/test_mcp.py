"""The Model Context Protocol with its official client over a real socket, and its messages as they are sent."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from PIL import Image

from sfumato.api.mcp import sessions
from support.answerable import within
from support.inside import Inside, running
from support.pictures import encoded
from support.serving import Server

T = TypeVar("T")

MODES = ["legacy", "auto"]
"""With a handshake and a session, and without: protocol versions up to 2025-11-25, and later ones."""

PHOTO = base64.b64encode(encoded(Image.radial_gradient("L").convert("RGB").resize((64, 64)))).decode()
SMALL = {"prompt": "a cat", "size": "64x64", "steps": 3, "seed": 7}
ACCEPT = {"accept": "application/json, text/event-stream"}
HELLO = {
    "jsonrpc": "2.0", "id": 1, "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "a", "version": "1"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("mcp")
    (folder / "models").mkdir()
    with Server(folder / "models", folder / "data", "--mcp-max-side", "96") as server:
        yield server


@asynccontextmanager
async def connected(url: str, mode: str = "auto", **headers: str) -> AsyncIterator[Client]:
    async with httpx2.AsyncClient(headers=headers, timeout=120) as http:
        transport = streamable_http_client(f"{url}/mcp", http_client=http)
        async with Client(transport, mode=mode) as client:  # type: ignore[arg-type]
            yield client


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def called(url: str, tool: str, arguments: dict[str, Any], mode: str = "auto", **headers: str) -> Any:
    async def call() -> Any:
        async with connected(url, mode, **headers) as client:
            return await client.call_tool(tool, arguments)

    return run(call())


@pytest.mark.parametrize("mode", MODES)
def test_tools(server: Server, mode: str) -> None:
    async def look() -> list[Any]:
        async with connected(server.url, mode) as client:
            return list((await client.list_tools()).tools)

    tools = {tool.name: tool for tool in run(look())}
    assert set(tools) == {"generate_image", "edit_image", "list_models", "get_progress"}
    assert tools["generate_image"].input_schema["required"] == ["prompt"]
    assert tools["edit_image"].input_schema["required"] == ["prompt", "image"]
    assert tools["list_models"].annotations.read_only_hint
    for tool in tools.values():
        assert tool.description
        fields = tool.input_schema["properties"].values()
        assert all(field["description"] for field in fields)


@pytest.mark.parametrize("mode", MODES)
def test_draws_and_tells_of_each_step(server: Server, mode: str) -> None:
    seen: list[tuple[float, float | None]] = []

    async def report(progress: float, total: float | None, message: str | None) -> None:
        seen.append((progress, total))

    async def draw() -> Any:
        async with connected(server.url, mode) as client:
            return await client.call_tool("generate_image", SMALL, progress_callback=report)

    result = run(draw())
    assert not result.is_error
    image, link, text = result.content
    assert (image.type, image.mime_type, link.type, text.type) == ("image", "image/png", "resource_link", "text")
    (drawn,) = result.structured_content["pictures"]
    assert json.loads(text.text) == result.structured_content
    assert (drawn["seed"], drawn["width"], drawn["height"], drawn["url"]) == (7, 64, 64, link.uri)
    fetched = httpx.get(link.uri)
    assert fetched.content == base64.b64decode(image.data)
    assert (fetched.headers["content-type"], link.mime_type, link.size) == ("image/png",) * 2 + (len(fetched.content),)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_large_picture_is_scaled_down_and_whole_behind_its_link(server: Server) -> None:
    result = called(server.url, "generate_image", SMALL | {"size": "128x64", "output_format": "webp"})
    image, link, _ = result.content
    shown = Image.open(io.BytesIO(base64.b64decode(image.data)))
    assert (shown.size, shown.format, image.mime_type) == ((96, 48), "WEBP", "image/webp")
    assert Image.open(io.BytesIO(httpx.get(link.uri).content)).size == (128, 64)


def test_several_pictures(server: Server) -> None:
    result = called(server.url, "generate_image", SMALL | {"n": 2, "cfg_scale": 3, "whatever": 1})
    assert [block.type for block in result.content] == ["image", "resource_link"] * 2 + ["text"]
    assert [each["seed"] for each in result.structured_content["pictures"]] == [7, 8]
    assert result.structured_content["ignored"] == ["whatever"]


@pytest.mark.parametrize("mode", MODES)
def test_edits(server: Server, mode: str) -> None:
    arguments = {"prompt": "a cat", "image": PHOTO, "strength": 0.5, "steps": 4}
    image, _, _ = called(server.url, "edit_image", arguments, mode).content
    made = json.loads(Image.open(io.BytesIO(base64.b64decode(image.data))).info["sfumato"])
    assert (len(made["image_sha256"]), made["strength"]) == (1, 0.5)


def test_edits_what_it_drew_by_its_link(server: Server) -> None:
    """A model has no other way to say: that one."""
    link = called(server.url, "generate_image", SMALL).content[1].uri
    edited = called(server.url, "edit_image", {"prompt": "a dog", "image": link, "steps": 4})
    assert not edited.is_error, edited.content
    assert edited.structured_content["pictures"][0]["url"] != link


def test_models(server: Server) -> None:
    (model,) = called(server.url, "list_models", {}).structured_content["models"]
    assert model["name"] == "sfumato-tiny"
    assert "text-to-image" in model["tasks"]


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("generate_image", {}, "prompt: this field is required"),
    ("generate_image", {"prompt": "a", "steps": "many"}, "steps: 'many' is not valid"),
    ("generate_image", {"prompt": "a", "model": "no-such"}, "There is no model 'no-such'"),
    ("generate_image", {"prompt": "a", "size": "100000x64"}, "size: 100000x64"),
    ("generate_image", {"prompt": "a", "wait": "maybe"}, "wait: 'maybe'"),
    ("edit_image", {"prompt": "a"}, "image: this field is required"),
    ("edit_image", {"prompt": "a", "image": "?"}, "image: '?' is neither base64"),
    ("get_progress", {"id": "no-such"}, "no queued, running or recent request 'no-such'"),
    ("get_progress", {"id": 5}, "id: must be a text"),
]


@pytest.mark.parametrize("mode", MODES)
def test_what_is_wrong_with_a_call_is_told_to_the_model(server: Server, mode: str) -> None:
    async def call() -> list[Any]:
        async with connected(server.url, mode) as client:
            return [await client.call_tool(tool, arguments) for tool, arguments, _ in WRONG]

    for result, (tool, arguments, words) in zip(run(call()), WRONG, strict=True):
        assert result.is_error, (tool, arguments)
        assert words in result.content[0].text, (tool, arguments, result.content)


def test_a_tool_that_is_not_there(server: Server) -> None:
    with pytest.raises((MCPError, ExceptionGroup)) as caught:
        called(server.url, "paint", {})
    error: Any = caught.value
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    assert "there is no tool 'paint'" in str(error)


LONG = {"prompt": "a cat", "size": "512x512", "steps": 900}


def requests(server: Server) -> list[dict[str, Any]]:
    return list(server.client.get("/v1/images/progress").json()["data"])


@pytest.mark.parametrize("mode", MODES)
def test_cancelled_to_the_step(server: Server, mode: str) -> None:
    """By the client's own cancellation: a notification in a session, the end of the stream without one."""
    ids: list[str] = []

    async def draw() -> None:
        async with connected(server.url, mode) as client:
            begun = asyncio.Event()

            async def report(progress: float, total: float | None, message: str | None) -> None:
                begun.set()

            call = asyncio.create_task(client.call_tool("generate_image", LONG, progress_callback=report))
            await asyncio.wait_for(begun.wait(), 120)
            listed = (await client.call_tool("get_progress", {})).structured_content["requests"]
            ids.extend(each["id"] for each in listed if each["status"] == "drawing")
            assert listed[0]["step"] >= 1
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await asyncio.to_thread(within, 60, lambda: not requests(server))

    run(draw())
    (id,) = ids
    ended = server.client.get(f"/v1/images/progress/{id}").json()
    assert ended["status"] == "cancelled"
    assert ended["step"] < 900


def test_without_waiting(server: Server) -> None:
    answer = called(server.url, "generate_image", SMALL | {"wait": False})
    assert [block.type for block in answer.content] == ["text"]
    id = answer.structured_content["id"]
    within(120, lambda: server.client.get(f"/v1/images/progress/{id}").json()["status"] == "completed")
    (request,) = called(server.url, "get_progress", {"id": id}).structured_content["requests"]
    (kept,) = request["kept"]
    assert httpx.get(kept["url"]).headers["content-type"] == "image/png"


def test_without_links_and_without_pictures(tmp_path: Path) -> None:
    inside = Inside(tmp_path, keep_pictures=False, mcp_max_side=0)
    with running(inside) as port:
        url = f"http://127.0.0.1:{port}"
        linked = called(url, "generate_image", {"prompt": "a cat"})
        assert [block.type for block in linked.content] == ["resource_link", "text"]
        alone = called(url, "generate_image", {"prompt": "a cat", "response_format": "b64_json"})
    assert [block.type for block in alone.content] == ["text"]
    assert alone.structured_content["pictures"][0]["url"] is None


def test_keys(tmp_path: Path) -> None:
    """A session belongs to the key that began it."""
    inside = Inside(tmp_path, api_keys="one:first,two:second")
    with running(inside) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=ACCEPT) as client:
        refused = client.post("/mcp", json=HELLO)
        assert refused.status_code == 401
        assert refused.json()["error"]["message"].startswith("an API key is required")
        assert (refused.json()["jsonrpc"], refused.json()["id"]) == ("2.0", None)
        for mode in MODES:
            result = called(
                str(client.base_url).rstrip("/"), "generate_image", {"prompt": "a"}, mode, authorization="Bearer first"
            )
            assert not result.is_error
            assert inside.engine.seen[-1].caller == "one"
        first = {"authorization": "Bearer first"}
        session = client.post("/mcp", json=HELLO, headers=first).headers["mcp-session-id"]
        plain = client.post("/mcp", content=b"{}", headers=first | {"content-type": "text/plain"})
        assert (plain.status_code, plain.json()["jsonrpc"]) == (415, "2.0")
        listing = {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}
        for key, status in (("first", 200), ("second", 404)):
            headers = {"authorization": f"Bearer {key}", "mcp-session-id": session}
            assert client.post("/mcp", json=listing, headers=headers).status_code == status


def test_one_callers_sessions_do_not_shut_out_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its oldest end: those that were used last, and the others' sessions, stay."""
    monkeypatch.setattr(sessions, "MAX_OF_CALLER", 3)
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 5)
    listing = {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}
    inside = Inside(tmp_path, api_keys="one:first,two:second,three:third")
    with running(inside) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=ACCEPT) as client:

        def begin(key: str) -> str:
            answer = client.post("/mcp", json=HELLO, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == 200, answer.text
            return str(answer.headers["mcp-session-id"])

        def status(key: str, session: str) -> int:
            headers = {"authorization": f"Bearer {key}", "mcp-session-id": session}
            return client.post("/mcp", json=listing, headers=headers).status_code

        other = begin("second")
        first, second, third = (begin("first") for _ in range(3))
        assert status("first", first) == 200  # used last: the second is the oldest now
        fourth = begin("first")
        assert [status("first", each) for each in (first, second, third, fourth)] == [200, 404, 200, 200]
        assert status("second", other) == 200
        ended = {"authorization": "Bearer first", "mcp-session-id": first}
        assert client.delete("/mcp", headers=ended).status_code == 200
        fifth = begin("first")  # in place of the one that its client has ended
        assert [status("first", each) for each in (third, fourth, fifth)] == [200] * 3
        begin("third")
        assert status("second", other) == 200
        begin("third")  # more than there may be of all
        assert [status("first", each) for each in (third, fourth, fifth)] == [404, 200, 200]
        assert status("second", other) == 200


def test_a_running_call_is_finished_when_the_server_stops(tmp_path: Path) -> None:
    """And the session's standing stream, which has no end of its own, does not hold up the stop."""
    (tmp_path / "models").mkdir()
    call = {"jsonrpc": "2.0", "id": 2, "method": "tools/call"}
    call |= {"params": {"name": "generate_image", "arguments": SMALL | {"steps": 400}}}
    with (
        Server(tmp_path / "models", tmp_path / "data", "--grace-s", "300") as server,
        httpx.Client(base_url=server.url, headers=ACCEPT, timeout=120) as client,
    ):
        client.headers["mcp-session-id"] = client.post("/mcp", json=HELLO).headers["mcp-session-id"]
        with client.stream("GET", "/mcp") as standing, client.stream("POST", "/mcp", json=call) as running_call:
            assert (standing.status_code, running_call.status_code) == (200, 200)
            server.wait_for(": accepted")
            server.signal(signal.SIGTERM)
            text = "".join(running_call.iter_text())
            assert "".join(standing.iter_text()) == ""
        assert server.wait() == 0
        assert '"pictures"' in text
        assert "Traceback" not in server.log
        assert "ASGI callable" not in server.log


def test_a_call_that_is_cut_off_ends_with_an_error_of_its_own(tmp_path: Path) -> None:
    """Its stream has begun, so what is left is an event: JSON-RPC's, with the call's id."""
    (tmp_path / "models").mkdir()
    call = {"jsonrpc": "2.0", "id": "seven", "method": "tools/call"}
    call |= {"params": {"name": "generate_image", "arguments": {"prompt": "hang"}}}
    program = (sys.executable, "-m", "support.stub_serve", str(tmp_path))
    with (
        Server(tmp_path / "models", tmp_path / "data", "--grace-s", "1", program=program) as server,
        httpx.Client(base_url=server.url, headers=ACCEPT, timeout=120) as client,
    ):
        client.headers["mcp-session-id"] = client.post("/mcp", json=HELLO).headers["mcp-session-id"]
        with client.stream("POST", "/mcp", json=call) as running_call:
            server.wait_for(": accepted")
            server.signal(signal.SIGTERM)
            lines = "".join(running_call.iter_text()).splitlines()
    (last,) = [json.loads(line.removeprefix("data: ")) for line in lines if "server_stopping" in line]
    assert (last["jsonrpc"], last["id"], last["error"]["code"]) == ("2.0", "seven", -32603)
    assert last["error"]["data"]["code"] == "server_stopping"


def test_limits_of_the_queue(tmp_path: Path) -> None:
    with running(Inside(tmp_path, max_n=2)) as port:
        result = called(f"http://127.0.0.1:{port}", "generate_image", {"prompt": "a", "n": 3})
    assert result.is_error
    assert "n: 3; 1 to 2 are valid" in result.content[0].text


REFUSED: list[tuple[str, dict[str, Any], int]] = [
    ("POST", {"json": HELLO, "headers": {"origin": "https://elsewhere.example"}}, 403),
    ("POST", {"json": HELLO, "headers": {"origin": "http://evil.example", "host": "evil.example"}}, 403),
    ("GET", {"headers": {"sec-fetch-site": "cross-site"}}, 403),
    ("POST", {"content": b"{}", "headers": {"content-type": "text/csv"}}, 415),
    ("POST", {"content": b"{}", "headers": {"content-type": "text/json"}}, 415),
    ("POST", {"content": b"{}", "headers": {"content-type": "application/ld+json"}}, 415),
    ("POST", {"content": b"{}"}, 415),
    ("POST", {"json": HELLO | {"padding": "x" * 2**20}}, 413),
    ("POST", {"json": HELLO | {"padding": [1] * 30_000}}, 400),
    ("POST", {"content": b"{", "headers": {"content-type": "application/json"}}, 400),
    ("POST", {"json": {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}, "headers": {"mcp-session-id": "x"}}, 404),
    ("DELETE", {"headers": {"mcp-session-id": "x"}}, 404),
    ("PUT", {}, 405),
]


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    inside = Inside(tmp_path_factory.mktemp("limited"), max_body_mb=1)
    with running(inside) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=ACCEPT) as client:
        yield client


@pytest.mark.parametrize(("method", "request_", "status"), REFUSED)
def test_refusals_are_json_rpcs(limited: httpx.Client, method: str, request_: dict[str, Any], status: int) -> None:
    answer = limited.request(method, "/mcp", **request_)
    assert answer.status_code == status, answer.text
    assert answer.json()["jsonrpc"] == "2.0"
    assert isinstance(answer.json()["error"]["code"], int)
    assert answer.json()["error"]["message"]
    assert answer.headers["x-request-id"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
MESSAGES = JSON | st.fixed_dictionaries(
    {"jsonrpc": st.just("2.0"), "method": st.sampled_from(["initialize", "tools/call", "tools/list", "ping", "x"])},
    optional={
        "id": st.integers() | st.text(max_size=3) | JSON,
        "params": JSON
        | st.fixed_dictionaries(
            {"name": st.sampled_from(["generate_image", "list_models", "x"]), "arguments": JSON},
            optional={"_meta": JSON},
        ),
    },
)


@given(
    message=MESSAGES,
    version=st.sampled_from([None, "2025-06-18", "2026-07-28", "1"]),
    accept=st.sampled_from(["application/json, text/event-stream", "*/*", "text/html"]),
)
@settings(max_examples=150, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_nothing_made_up_breaks_it(limited: httpx.Client, message: Any, version: str | None, accept: str) -> None:
    headers = {"accept": accept} | ({"mcp-protocol-version": version} if version else {})
    answer = limited.post("/mcp", json=message, headers=headers)
    assert answer.status_code < 500, answer.text
    if answer.headers.get("content-type", "").startswith("application/json"):
        assert answer.json()["jsonrpc"] == "2.0"


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp.server.lowlevel", None)
    with Inside(tmp_path).client() as client:
        answer = client.post("/mcp", json=HELLO, headers=ACCEPT)
    assert answer.status_code == 501
    assert "pip install 'sfumato[mcp]'" in answer.json()["error"]["message"]
    assert answer.json()["jsonrpc"] == "2.0"
