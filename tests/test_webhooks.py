"""Webhooks of jobs and batches: signed, sent again until they are received, to allowed hosts only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from sfumato.api.webhooks import sender, signature
from sfumato.errors import InvalidRequest
from sfumato.settings import Settings
from support.answerable import within
from support.batching_client import GENERATIONS, begun, ended, jsonl, sdk
from support.inside import Inside
from support.job_rows import execute, sqlite
from support.quick import FOR_EVER
from support.receiver import SECRET, Receiver
from support.seeded import GATED, Server
from support.serving import TIMEOUT_S

ASYNC = {"prefer": "respond-async"}
CAT = {"prompt": "a cat"}


FLAGS = ("--webhook-hosts", "localhost", "--webhook-secret", SECRET)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("webhooks"), *FLAGS) as server:
        yield server


def test_the_signature_of_the_scheme() -> None:
    """The vector of the scheme's reference libraries."""
    payload = b'{"test": 2432232314}'
    headers = signature.headers(signature.key_of(SECRET), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, payload)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    "secret", ["", "secret", "whsec_", "whsec_no base64", "whsec_" + "YQ==", "MfKQ9r8GKYqrTwjUPD8I"]
)
def test_a_wrong_secret_stops_the_server(tmp_path: Path, secret: str) -> None:
    with pytest.raises(ValueError, match="webhook_secret: must be whsec_"):
        Inside(tmp_path, webhook_hosts="localhost", webhook_secret=secret)


def test_jobs_tell_of_their_end(server: Server) -> None:
    with Receiver().running() as receiver:
        headers = ASYNC | {"x-webhook-url": receiver.url}
        bodies: dict[str, dict[str, Any]] = {
            "completed": CAT,
            "failed": CAT | {"image": "bm8gcGljdHVyZQ=="},
            "cancelled": CAT | {"steps": FOR_EVER},
        }
        for state, body in bodies.items():
            answer = server.client.post(GENERATIONS, json=body, headers=headers)
            assert answer.status_code == 202, answer.text
            if state == "cancelled":
                server.client.delete(answer.headers["location"])
            count = len(receiver.messages) + 1
            within(TIMEOUT_S, lambda count=count: len(receiver.messages) >= count)
            event = receiver.event()
            assert (event["type"], event["data"]) == (f"job.{state}", {"id": answer.json()["id"]})
            assert abs(event["created_at"] - time.time()) < 3600
        assert len(receiver.messages) == 3


def test_batches_tell_of_their_end(server: Server) -> None:
    with Receiver().running() as receiver, sdk(server) as client:
        told = {"x-webhook-url": receiver.url}
        batch = begun(client, jsonl([CAT]), extra_headers=told)
        within(TIMEOUT_S, lambda: len(receiver.messages) == 1)
        assert (receiver.event()["type"], receiver.event()["data"]["id"]) == ("batch.completed", batch.id)
        with openai.OpenAI(api_key="unused", webhook_secret=SECRET) as other:
            headers, body = receiver.messages[0]
            assert other.webhooks.unwrap(body, headers).type == "batch.completed"
        begun(client, b"no json", extra_headers=told)
        within(TIMEOUT_S, lambda: len(receiver.messages) == 2)
        assert receiver.event()["type"] == "batch.failed"
        long = begun(client, jsonl([CAT | {"steps": FOR_EVER}]), extra_headers=told)
        client.batches.cancel(long.id)
        ended(client, long.id)
        within(TIMEOUT_S, lambda: len(receiver.messages) == 3)
        assert receiver.event()["type"] == "batch.cancelled"


def test_it_is_sent_again_until_it_is_received_also_by_another_process(tmp_path: Path) -> None:
    """Refused, redirected, the server killed: each time the same message."""
    with Receiver(500, 302).running() as receiver:
        with Server(tmp_path, *FLAGS) as server:
            headers = ASYNC | {"x-webhook-url": receiver.url}
            server.client.post(GENERATIONS, json=CAT | {"prompt": GATED}, headers=headers)
            server.open_gate()
            for count in (1, 2):
                within(TIMEOUT_S, lambda count=count: len(receiver.messages) == count)
                within(TIMEOUT_S, lambda: server.log.count("it is sent again") == len(receiver.messages))
                if count == 1:
                    execute(sqlite(tmp_path), "UPDATE webhooks SET due = 0")  # rather than to wait
            server.kill()
        execute(sqlite(tmp_path), "UPDATE webhooks SET due = 0")
        with Server(tmp_path, *FLAGS) as server:
            within(TIMEOUT_S, lambda: len(receiver.messages) == 3)
            assert server.client.post(GENERATIONS, json=CAT).status_code == 200
        events = [receiver.event(index) for index in range(3)]
        assert events[0] == events[1] == events[2]
        assert "http://127.0.0.1:1/" not in server.log  # the redirect was not followed
        assert f"{receiver.url.rpartition('/')[0]}: status" in server.log
        assert receiver.url not in server.log  # its path may be a secret


def test_tries_have_growing_pauses_and_an_end(tmp_path: Path) -> None:
    """On a clock of the test's."""
    seconds = 1000.0
    inside = Inside(tmp_path, webhook_hosts="localhost", webhook_secret=SECRET)
    webhooks = inside.app.state.webhooks
    webhooks.clock = lambda: seconds
    webhooks.start = lambda: None
    with Receiver(*[500] * 20).running() as receiver, inside.client() as client:
        assert client.portal
        begin = inside.app.state.jobs.store.begin
        from sfumato.api.webhooks import outbox

        with begin() as connection:
            outbox.add(connection, receiver.url, "job.completed", "an id")
        execute(sqlite(tmp_path), "UPDATE webhooks SET due = 1000")

        async def look() -> int:
            async with webhooks._client() as sending:
                return int(await webhooks.look(sending))

        for pause in sender.PAUSES_S:
            assert client.portal.call(look) == 1
            seconds += pause - 1
            assert client.portal.call(look) == 0
            seconds += 1
        assert client.portal.call(look) == 1  # for the last time
        seconds += 10**6
        assert client.portal.call(look) == 0
        assert len(receiver.messages) == len(sender.PAUSES_S) + 1
        with begin() as connection:
            outbox.add(connection, receiver.url, "job.completed", "another id")
        execute(sqlite(tmp_path), "UPDATE webhooks SET due = 0")
        receiver.statuses = [410]
        assert [client.portal.call(look) for _ in range(2)] == [1, 0]
        before = len(receiver.messages)
        with begin() as connection:  # accepted when its host was still listed
            outbox.add(connection, receiver.url.replace("localhost", "127.0.0.1"), "job.completed", "an id")
        execute(sqlite(tmp_path), "UPDATE webhooks SET due = 0")
        assert [client.portal.call(look) for _ in range(2)] == [1, 0]
        assert len(receiver.messages) == before
        receiver.statuses = []
        with begin() as connection:
            for number in range(20):
                outbox.add(connection, receiver.url, "job.completed", str(number))
            outbox.add(connection, "http://other.example/", "job.completed", "an id")
        execute(sqlite(tmp_path), "UPDATE webhooks SET due = 0")
        taken = webhooks._outbox.take(seconds, seconds, 8, {})
        assert sorted(message.url for message in taken) == [receiver.url, receiver.url, "http://other.example/"]
        assert webhooks._outbox.take(seconds - 1, seconds, 8, {"localhost": 2}) == []
        execute(sqlite(tmp_path), "DELETE FROM webhooks WHERE url LIKE '%example%'")
        execute(sqlite(tmp_path), "UPDATE webhooks SET due = 0")
        assert [client.portal.call(look) for _ in range(2)] == [20, 0]  # two at a time, one after the other
        assert len(receiver.messages) == before + 20


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.com/x", "may be sent to; they are: localhost"),
        ("http://127.0.0.1:9/x", "may be sent to"),
        ("ftp://localhost/x", "http or https"),
        ("http://me:secret@localhost/x", "without a name and password"),
        ("http://localhost:99999/", "is valid"),
        ("http:///x", "is valid"),
        ("localhost", "is valid"),
        ("", "is valid"),
        ("http://localhost/" + "x" * 2000, "at most 2000"),
    ],
)
def test_other_urls_are_refused(server: Server, url: str, reason: str) -> None:
    before = server.drawn()
    answer = server.client.post(GENERATIONS, json=CAT, headers=ASYNC | {"x-webhook-url": url})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-webhook-url")
    assert reason in answer.json()["error"]["message"]
    assert "secret" not in answer.text
    assert server.drawn() == before


def test_it_needs_a_job_and_the_operators_consent(server: Server, tmp_path: Path) -> None:
    url = {"x-webhook-url": "http://localhost/x"}
    alone = server.client.post(GENERATIONS, json=CAT, headers=url)
    assert (alone.status_code, "respond-async" in alone.text) == (400, True)
    with Inside(tmp_path).client() as client:
        refused = client.post(GENERATIONS, json=CAT, headers=ASYNC | url)
        assert (refused.status_code, "they are: none (the setting webhook_hosts)" in refused.text) == (400, True)


@pytest.mark.parametrize("name", ["webhook_hosts", "picture_hosts", "lora_hosts"])
@pytest.mark.parametrize(
    "text", ["a.example:443", "https://a.example", "a.example/x", "a.example b.example", "[::1]:80"]
)
def test_hosts_that_would_match_nothing_are_refused(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"{name.upper()}.*without scheme, port and path"):
        Settings.load(env={f"SFUMATO_{name.upper()}": text})


def test_an_ipv6_address_is_a_host_with_and_without_brackets(tmp_path: Path) -> None:
    inside = Inside(tmp_path, webhook_hosts="[::1], FD00::1,", webhook_secret=SECRET)
    for url in ("http://[::1]:9/x", "http://[fd00::1]/x"):
        assert inside.app.state.webhooks.checked(url) == url


def test_a_clip_is_a_job_without_prefer_and_one_url_is_told(tmp_path: Path) -> None:
    inside = Inside(tmp_path, webhook_hosts="localhost", webhook_secret=SECRET)
    url = ("x-webhook-url", "http://localhost:9/x")
    with inside.client() as client:
        clip = client.post("/v1/videos", json={"prompt": "a cat"}, headers=[url])
        assert "others get their answer" not in clip.text
        batch = {"input_file_id": "f", "endpoint": GENERATIONS, "completion_window": "24h"}
        for path, body in {"/v1/videos": {"prompt": "a cat"}, "/v1/batches": batch}.items():
            twice = client.post(path, json=body, headers=[url, url])
            assert (twice.status_code, "2 times" in twice.text) == (400, True)


def test_any_host_means_any_with_a_public_address(tmp_path: Path) -> None:
    inside = Inside(tmp_path, webhook_hosts="*", webhook_secret=SECRET)
    webhooks = inside.app.state.webhooks
    webhooks.start = lambda: None
    assert webhooks.checked("http://localhost:9/x")
    with pytest.raises(InvalidRequest):  # it would stand in the log
        webhooks.checked("http://localhost/\x1b[2J")

    async def status() -> tuple[int, str]:
        async with webhooks._client() as sending:
            return await webhooks._status(sending, sender.Message("evt_1", "http://localhost:9/x", b"{}", 0))

    with inside.client() as client:
        assert client.portal
        told = client.portal.call(status)
    assert told[0] == 0
    assert "not a public address" in told[1]
    assert "webhook_hosts" in told[1]


def test_one_key_with_another_webhook_is_another_request(server: Server) -> None:
    keyed = ASYNC | {"idempotency-key": "told", "x-webhook-url": "http://localhost:9/x"}
    first = server.client.post(GENERATIONS, json=CAT, headers=keyed)
    again = server.client.post(GENERATIONS, json=CAT, headers=keyed)
    assert (first.status_code, again.json()["id"]) == (202, first.json()["id"])
    other = server.client.post(GENERATIONS, json=CAT, headers=keyed | {"x-webhook-url": "http://localhost:9/y"})
    assert other.status_code == 422


def test_a_round_that_fails_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the loops that look for messages, batches and jobs."""
    from sfumato.api.batches import batches
    from sfumato.api.jobs import jobs

    for module, name in ((sender, "LOOK_S"), (batches, "BEAT_S"), (jobs, "BEAT_S"), (jobs, "EXPIRE_S")):
        monkeypatch.setattr(module, name, 0.01)
    rounds: list[str] = []

    def failing(name: str) -> Any:
        async def fails(*_: Any) -> None:
            rounds.append(name)
            raise RuntimeError

        return fails

    inside = Inside(tmp_path, webhook_hosts="localhost", webhook_secret=SECRET)
    monkeypatch.setattr(inside.app.state.webhooks, "look", failing("webhooks"))
    monkeypatch.setattr(inside.app.state.batches, "look", failing("batches"))
    monkeypatch.setattr(inside.app.state.jobs, "_try", failing("jobs"))
    with inside.client():
        within(TIMEOUT_S, lambda: all(rounds.count(name) > 1 for name in ("webhooks", "batches", "jobs")))
