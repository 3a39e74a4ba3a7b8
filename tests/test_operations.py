"""What operators see: health, metrics, the log, CORS, the docs page; and disks that do not play along."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sfumato import logs
from sfumato.commands import serve
from sfumato.engine.protocol import DeviceState
from sfumato.errors import SfumatoError
from sfumato.serving.metrics import DEVICE_METRICS, EVENT_METRICS, SNAPSHOT_METRICS, Metrics
from sfumato.settings import Settings
from sfumato.status import EngineStats
from support.inside import DRAW, Inside, running
from support.serving import Server

ORIGIN = "https://app.example"
URL = {"json": {**DRAW["json"], "response_format": "url"}}


@pytest.fixture
def inside(tmp_path: Path) -> Inside:
    return Inside(tmp_path)


# Health.


def test_ready_when_a_worker_is_up_and_a_model_file_can_be_used(inside: Inside, tmp_path: Path) -> None:
    with inside.client() as client:
        assert client.get("/readyz").json() == {"status": "ready"}
        (tmp_path / "models" / "m.yaml").write_text("name: m\nparameters:\n  modle: x\n")
        broken = client.get("/readyz")
        inside.engine.ready = False
        starting = client.get("/readyz")
        inside.engine.stats = replace(inside.engine.stats, restarts=1)
        died = client.get("/readyz")
        assert client.get("/healthz").json()["status"] == "ok"
    for answer, words in ((broken, "sfumato check"), (starting, "not up yet"), (died, "died")):
        assert answer.status_code == 503
        assert words in answer.json()["reason"]


# Metrics.


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    return samples(text)[name, frozenset(labels.items())]


def rendered(metrics: Metrics, **moment: Any) -> str:
    devices = [DeviceState("auto", True, "", 0, moment.pop("stats", EngineStats()), {})]
    moment = {"ready": True, "queue_depth": {}, "running": {}, "devices": devices} | moment
    return metrics.render(**moment).decode()


def test_every_metric_is_rendered_once() -> None:
    metrics = Metrics()
    metrics.record_http("/v1/images/generations", "POST", 200, 1.5)
    metrics.record_wait("interactive", 0.2)
    metrics.record_picture("m", "batch", 3.0)
    metrics.record_failure("m", "worker_died")
    metrics.record_rejection("rate_limit_exceeded")
    text = rendered(metrics, stats=EngineStats(batch_sizes={1: 2}))
    declared = [name for name in re.findall(r"^# TYPE (\S+)", text, re.MULTILINE) if name.startswith("sfumato_")]
    assert set(declared) - {f"{each.name.removesuffix('_total')}_created" for each in EVENT_METRICS} == {
        each.name for each in (*EVENT_METRICS, *SNAPSHOT_METRICS, *DEVICE_METRICS)
    }
    assert len(declared) == len(set(declared))
    assert value(text, "process_resident_memory_bytes") > 1e6


def test_what_is_counted() -> None:
    metrics = Metrics()
    for seconds in (0.2, 4.0):
        metrics.record_picture("m", "batch", seconds)
    metrics.record_wait("interactive", 0.3)
    metrics.record_failure("m", "worker_died")
    metrics.record_rejection("rate_limit_exceeded")
    text = rendered(metrics)
    assert value(text, "sfumato_picture_seconds_count", model="m", priority="batch") == 2
    assert value(text, "sfumato_picture_seconds_sum", model="m", priority="batch") == 4.2
    assert value(text, "sfumato_picture_seconds_bucket", model="m", priority="batch", le="1.0") == 1
    assert value(text, "sfumato_queue_wait_seconds_sum", priority="interactive") == 0.3
    assert value(text, "sfumato_failures_total", model="m", code="worker_died") == 1
    assert value(text, "sfumato_rejected_total", code="rate_limit_exceeded") == 1
    assert "worker_died" not in rendered(Metrics())


def test_what_is_read() -> None:
    stats = EngineStats(
        forwards=9, batch_sizes={1: 2, 4: 3}, steps=14, step_seconds=2.5, loads=5, evictions=3, restarts=1,
        resident_models=2, memory_bytes=123456, device_memory_bytes=789,
        unbatched={("unet", "refused"): 6, ("vae", "changed_module"): 1},
        prompt_hits=11, prompt_misses=12, prompt_cache_bytes=13,
    )  # fmt: skip
    text = rendered(Metrics(), ready=False, queue_depth={"batch": 7}, running={"interactive": 6}, stats=stats)
    assert value(text, "sfumato_ready") == 0
    assert value(text, "sfumato_queue_depth", priority="batch") == 7
    assert value(text, "sfumato_running_pictures", priority="interactive") == 6
    assert value(text, "sfumato_forwards_total") == 9
    assert value(text, "sfumato_batch_size_forwards_total", size="1") == 2
    assert value(text, "sfumato_batch_size_forwards_total", size="4") == 3
    assert value(text, "sfumato_unbatched_forwards_total", module="unet", reason="refused") == 6
    assert value(text, "sfumato_unbatched_forwards_total", module="vae", reason="changed_module") == 1
    assert value(text, "sfumato_prompt_cache_total", result="hit") == 11
    assert value(text, "sfumato_prompt_cache_total", result="miss") == 12
    assert value(text, "sfumato_prompt_cache_bytes") == 13
    assert value(text, "sfumato_steps_total") == 14
    assert value(text, "sfumato_step_seconds_total") == 2.5
    assert value(text, "sfumato_model_loads_total") == 5
    assert value(text, "sfumato_model_evictions_total") == 3
    assert value(text, "sfumato_worker_restarts_total") == 1
    assert value(text, "sfumato_resident_models") == 2
    assert value(text, "sfumato_worker_memory_bytes") == 123456
    assert value(text, "sfumato_device_memory_bytes") == 789


def test_several_devices_are_told_apart_by_a_label() -> None:
    one = DeviceState("cuda:0", True, "", 3, EngineStats(steps=4, model_bytes={"m": 7}), {})
    other = DeviceState("cuda:1", False, "it has gone", 0, EngineStats(steps=5, batch_sizes={2: 6}), {})
    text = rendered(Metrics(), devices=[one, other])
    assert value(text, "sfumato_steps_total", device="cuda:0") == 4
    assert value(text, "sfumato_steps_total", device="cuda:1") == 5
    assert value(text, "sfumato_device_ready", device="cuda:0") == 1
    assert value(text, "sfumato_device_ready", device="cuda:1") == 0
    assert value(text, "sfumato_device_pictures", device="cuda:0") == 3
    assert value(text, "sfumato_model_memory_bytes", device="cuda:0", model="m") == 7
    assert value(text, "sfumato_batch_size_forwards_total", device="cuda:1", size="2") == 6


def test_metrics_over_http(inside: Inside) -> None:
    with inside.client() as client:
        client.post("/v1/images/generations", **DRAW)
        client.post("/images/generations", **DRAW)
        client.post("/v1/images/generations", json={})
        client.get("/generated-images/" + "f" * 32 + ".png")
        client.get("/no-such-path-a")
        client.request("BREW", "/no-such-path-b")
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = answer.text
    name = "sfumato_http_requests_total"
    assert value(text, name, route="/v1/images/generations", method="POST", status="200") == 1
    assert value(text, name, route="/images/generations", method="POST", status="200") == 1
    assert value(text, name, route="/v1/images/generations", method="POST", status="400") == 1
    assert value(text, name, route="/generated-images/{name}", method="GET", status="404") == 1
    assert value(text, name, route="none", method="GET", status="404") == 1
    assert value(text, name, route="none", method="other", status="404") == 1
    assert value(text, "sfumato_http_request_seconds_count", route="/v1/images/generations", method="POST") == 2
    assert value(text, "sfumato_picture_seconds_count", model="m", priority="interactive") == 2
    assert value(text, "sfumato_queue_wait_seconds_count", priority="interactive") == 2
    assert value(text, "sfumato_ready") == 1
    assert "no-such-path" not in text
    assert "ffff" not in text


def test_metrics_need_a_key_and_count_refusals(tmp_path: Path) -> None:
    with Inside(tmp_path, api_keys="a:secret-key").client() as client:
        assert client.get("/metrics").status_code == 401
        text = client.get("/metrics", headers={"x-api-key": "secret-key"}).text
    assert value(text, "sfumato_rejected_total", code="invalid_api_key") == 1
    assert "secret-key" not in text


# The log.

SECRET = {
    "prompt": "zanzibarquokka on a bicycle",
    "negative": "umbrellaxylophone",
    "key": "key-abcdef-secret",
    "query": "tokenzebra",
    "foreign": "passwordyak",
    "wrong": "wrongkeywombat",
}


@pytest.fixture(params=["text", "json"])
def logged(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Server]]:
    """A server with keys at the level debug, which has everything secret sent to it."""
    (tmp_path / "models").mkdir()
    flags = ["--log-format", request.param, "--log-level", "debug", "--default-model", "sfumato-tiny"]
    env = {"SFUMATO_API_KEYS": f"anna:{SECRET['key']}", "HF_HUB_OFFLINE": "1"}
    with Server(tmp_path / "models", tmp_path / "data", *flags, env=env) as server:
        server.client.headers["authorization"] = f"Bearer {SECRET['key']}"
        path = f"/v1/images/generations?token={SECRET['query']}"
        body = {"prompt": SECRET["prompt"], "negative_prompt": SECRET["negative"], "auth": SECRET["foreign"], "step": 1}
        answer = server.client.post(path, json=body, headers={"x-request-id": "the-good-one"})
        assert answer.status_code == 200, answer.text
        for bad in (
            {"prompt": {"text": SECRET["prompt"]}},
            {"prompt": SECRET["prompt"], "n": SECRET["negative"]},
            {"prompt": SECRET["prompt"], "size": SECRET["negative"]},
            {"prompt": SECRET["prompt"], "image": SECRET["negative"]},
        ):
            assert server.draw(**bad).status_code == 400
        assert server.client.post(path, content=SECRET["prompt"]).status_code == 400
        wrong = server.client.get("/v1/models", headers={"authorization": f"Bearer {SECRET['wrong']}"})
        assert wrong.status_code == 401
        assert server.client.get("/evil%0A2026 INFO sfumato: forged%1B[2J").status_code == 404
        assert server.client.get("/healthz", headers={"x-request-id": "the-last-one"}).status_code == 200
        server.wait_for("the-last-one")
        server.stop()
        yield request.param, server


def test_the_log_tells_who_asked_and_not_what(logged: tuple[str, Server]) -> None:
    form, server = logged
    for secret in SECRET.values():
        assert secret.split()[0] not in server.log
    if form == "json":
        ours = [json.loads(line) for line in server.lines if line.startswith("{")]
        (line,) = (line for line in ours if line.get("request_id") == "the-good-one" and "status" in line)
        assert line.pop("seconds") > 0
        assert line.pop("message").startswith("POST /v1/images/generations 200 ")
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
        assert line == {
            "level": "info",
            "logger": "sfumato.access",
            "request_id": "the-good-one",
            "method": "POST",
            "path": "/v1/images/generations",
            "status": 200,
            "caller": "anna",
        }
        (health,) = (line for line in ours if line.get("path") == "/healthz")
        assert health["level"] == "debug"
        assert [line["status"] for line in ours if line.get("path") == "/v1/models"] == [401]
    else:
        (line,) = re.findall(r".* sfumato\.access: .*\[the-good-one\]$", server.log, re.MULTILINE)
        assert re.search(r" INFO sfumato\.access: POST /v1/images/generations 200 \d+\.\d{3} s caller=anna ", line)
        assert re.search(r"DEBUG sfumato.access: GET /healthz 200 .* caller=anna \[the-last-one\]", server.log)
    assert not any(line.startswith("2026 INFO sfumato: forged") for line in server.lines)
    assert "\x1b" not in server.log


def test_no_line_can_be_forged() -> None:
    record = logging.LogRecord("sfumato", logging.INFO, "", 0, "%s", ("good\n2026 INFO sfumato: bad\x1b[2J\r",), None)
    assert "\n    2026 INFO sfumato: bad\\x1b[2J\\x0d" in logs.TextLines().format(record)
    assert json.loads(logs.JsonLines().format(record))["message"] == "good\n2026 INFO sfumato: bad\x1b[2J\r"


def test_levels_have_names() -> None:
    assert Settings.load({"log_level": "WARNING"}, {}).log_level == "warning"
    with pytest.raises(ValueError, match="log_level='loud': must be one of debug, info, warning, error"):
        Settings.load({"log_level": "loud"}, {})


def test_a_prompt_that_is_cut_off_is_not_logged(tmp_path: Path) -> None:
    """diffusers warns with the words that did not fit. And the worker's lines are JSON like the others."""
    (tmp_path / "models").mkdir()
    flags = ["--log-format", "json", "--log-level", "debug", "--default-model", "sfumato-tiny"]
    with Server(tmp_path / "models", tmp_path / "data", *flags, env={"HF_HUB_OFFLINE": "1"}) as server:
        assert server.draw(prompt="llamaferret " * 120, step=1).status_code == 200
        server.stop()
    assert "llamaferret" not in server.log
    loggers = {json.loads(line)["logger"] for line in server.lines}
    assert {"sfumato", "sfumato.access", "sfumato.engine.loop"} <= loggers


def test_an_error_nobody_foresaw_is_logged_by_its_place(
    inside: Inside, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def get(name: str) -> None:
        raise ValueError(f"no good: {name}")

    monkeypatch.setattr(inside.store, "get", get)
    with inside.client() as client, caplog.at_level(logging.DEBUG, "sfumato"):
        answer = client.get("/generated-images/my-secret-words", headers={"x-request-id": "x"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "my-secret-words" not in answer.text
    assert answer.headers["x-request-id"] == "x"
    (record,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert "ValueError at" in record.getMessage()
    assert "in get" in record.getMessage()
    assert "my-secret-words" not in record.getMessage()


# Other origins.


@pytest.mark.parametrize("origins", [f"http://localhost:3000, {ORIGIN}/", "*"])
def test_a_web_page_may_ask(tmp_path: Path, origins: str) -> None:
    asked = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-request-id,x-api-key",
    }
    with Inside(tmp_path, cors_origins=origins, api_keys="a:secret").client() as client:
        preflight = client.options("/v1/images/generations", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] in (ORIGIN, "*")
    assert "POST" in preflight.headers["access-control-allow-methods"]


def test_every_answer_can_be_read_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = Inside(tmp_path, cors_origins=ORIGIN, api_keys="a:secret", max_body_mb=1)

    def get(name: str) -> None:
        raise ValueError(name)

    monkeypatch.setattr(inside.store, "get", get)
    key = {"x-api-key": "secret"}

    def chunks() -> Iterator[bytes]:
        yield b" " * (1 << 21)

    with inside.client() as client:
        answers = {
            200: client.get("/v1/models", headers={"origin": ORIGIN, **key}),
            400: client.post("/v1/images/generations", json={}, headers={"origin": ORIGIN, **key}),
            401: client.get("/v1/models", headers={"origin": ORIGIN}),
            404: client.get("/nothing", headers={"origin": ORIGIN, **key}),
            405: client.put("/v1/models", headers={"origin": ORIGIN, **key}),
            413: client.post("/v1/images/generations", content=b" " * (1 << 21), headers={"origin": ORIGIN, **key}),
            500: client.get("/generated-images/x", headers={"origin": ORIGIN}),
        }
        streamed = client.post("/v1/images/generations", content=chunks(), headers={"origin": ORIGIN, **key})
    assert {status: answer.status_code for status, answer in answers.items()} == {status: status for status in answers}
    assert streamed.status_code == 413
    for answer in (*answers.values(), streamed):
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        assert {*exposed} == {
            "x-request-id", "x-sfumato-ignored", "x-sfumato-warning", "retry-after", "x-should-retry", "mcp-session-id",
            "location", "preference-applied", "idempotency-replayed",
        }  # fmt: skip
        assert answer.headers["x-request-id"]
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("origins", ["", "https://other.example"])
def test_other_pages_may_not(tmp_path: Path, origins: str) -> None:
    with Inside(tmp_path, cors_origins=origins).client() as client:
        assert "access-control-allow-origin" not in client.get("/healthz", headers={"origin": ORIGIN}).headers
        asked = {"origin": ORIGIN, "access-control-request-method": "POST"}
        assert client.options("/v1/models", headers=asked).status_code in (400, 405)


@pytest.mark.parametrize("origins", ["app.example", "https://app.example/path", "https://a b"])
def test_origins_that_are_none(tmp_path: Path, origins: str) -> None:
    with pytest.raises(ValueError, match="cors_origins"):
        Inside(tmp_path, cors_origins=origins)


# The docs page.


def test_the_docs_page_needs_no_internet(inside: Inside) -> None:
    with inside.client() as client:
        page = client.get("/docs")
        assert "://" not in page.text
        links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert len(links) == 3
        for link in links:
            assert len(client.get(f"/{link}").content) > 100
        assert "url: 'openapi.json'" in page.text
        assert client.get("/docs/swagger-ui.js.map").status_code == 404


# Settings that cannot be understood.


@pytest.mark.parametrize(
    "wrong", [{"api_keys": "secret"}, {"cors_origins": "x"}, {"trusted_proxies": "x"}, {"public_url": "x"}]
)
def test_the_server_does_not_start_with_them(wrong: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "configure", lambda settings: None)
    with pytest.raises(SfumatoError, match=next(iter(wrong))) as caught:
        serve.serve(Settings(port=0, **wrong))
    assert "secret" not in str(caught.value)


# Disks.


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux lets us limit another process")
def test_row_27_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    flags = ["--default-model", "sfumato-tiny"]
    body = {"prompt": "a red circle", "step": 1, "response_format": "url"}
    with Server(tmp_path / "models", tmp_path / "data", *flags, env={"HF_HUB_OFFLINE": "1"}) as server:
        first = server.draw(**body).json()["data"][0]["url"]
        whole = httpx.get(first).content
        # No file may become larger than half a picture: each write fails in its middle, as on a full disk.
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (len(whole) // 2, hard))
        failed = server.draw(**body)
        assert failed.status_code == 507
        assert failed.json()["error"]["code"] == "storage_failed"
        assert failed.headers["x-should-retry"] == "false"
        assert [path.name for path in (tmp_path / "data" / "generated-images").iterdir()] == [first.rpartition("/")[2]]
        assert httpx.get(first).content == whole
        assert server.draw(**{**body, "response_format": "b64_json"}).status_code == 200
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (hard, hard))
        assert server.draw(**body).status_code == 200


def test_row_27_a_deleted_picture_is_not_found(inside: Inside) -> None:
    with inside.client() as client:
        for spoil in (Path.unlink, lambda path: path.write_bytes(b"")):
            url = client.post("/v1/images/generations", **URL).json()["data"][0]["url"]
            assert client.get(url).headers["content-type"] == "image/png"
            spoil(inside.store.folder / url.rpartition("/")[2])
            gone = client.get(url)
            assert gone.status_code == 404
            assert set(gone.json()["error"]) == {"message", "type", "param", "code"}


def test_row_27_a_picture_deleted_while_it_is_sent_arrives_whole(inside: Inside) -> None:
    data = os.urandom(1 << 25)  # more than the sockets between us hold
    name = inside.store.put(data)
    with running(inside) as port, socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(f"GET /generated-images/{name} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        begun = client.recv(1000)
        assert begun.startswith(b"HTTP/1.1 200")
        (inside.store.folder / name).unlink()
        rest = b"".join(iter(lambda: client.recv(1 << 20), b""))
    assert (begun + rest).partition(b"\r\n\r\n")[2] == data
    assert inside.store.get(name) is None


def test_old_pictures_leave_when_the_server_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = Inside(tmp_path, outputs_max_age_h=1)
    old, young = inside.store.put(b"old"), inside.store.put(b"young")
    os.utime(inside.store.folder / old, (0, 0))
    looked = threading.Event()
    expire = inside.store.expire

    def expire_and_tell(**given: Any) -> None:
        expire(**given)
        looked.set()

    monkeypatch.setattr(inside.store, "expire", expire_and_tell)
    with inside.client() as client:
        assert looked.wait(30)
        assert client.get(f"/generated-images/{old}").status_code == 404
        assert client.get(f"/generated-images/{young}").content == b"young"


@pytest.mark.parametrize(("format", "signature"), [("webp", b"RIFF"), ("jpeg", b"\xff\xd8"), ("png", b"\x89PNG")])
def test_each_format_is_served_as_itself(inside: Inside, format: str, signature: bytes) -> None:
    with inside.client() as client:
        body = {**URL["json"], "output_format": format}
        url = client.post("/v1/images/generations", json=body).json()["data"][0]["url"]
        picture = client.get(url)
    assert picture.headers["content-type"] == f"image/{format}"
    assert picture.content.startswith(signature)
