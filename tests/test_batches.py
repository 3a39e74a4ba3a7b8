"""OpenAI's Files and Batches, through the official SDK against a real server process."""

from __future__ import annotations

import asyncio
import base64
import json
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sql

from sfumato.api.batches import lines
from sfumato.api.batches.batches import Batches, _Active
from sfumato.api.batches.files import FileStore
from sfumato.api.batches.store import BatchStore
from sfumato.api.batches.tables import CHUNK, Line, StoredBatch, StoredFile
from sfumato.api.jobs import jobs as jobs_module
from sfumato.api.jobs.run import Run
from sfumato.api.jobs.store import JobStore
from sfumato.errors import JobsUnavailable
from support.answerable import within
from support.batching_client import EDITS, GENERATIONS, begun, counts, ended, jsonl, lines_of, sdk, uploaded
from support.quick import FOR_EVER
from support.seeded import GATED, Server, colour, colour_of
from support.serving import TIMEOUT_S

B64 = {"response_format": "b64_json"}
CAT = {"prompt": "a cat"} | B64
PHOTO = Server.png_data_uri()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("batches"), "--max-active", "4", "--max-queue", "8") as server:
        yield server


@pytest.fixture(autouse=True)
def open_gate(server: Server) -> Iterator[None]:
    """A test that failed holds up no other."""
    yield
    server.open_gate()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with sdk(server) as client:
        yield client


def test_the_answers_are_those_of_the_requests(client: openai.OpenAI, server: Server) -> None:
    bodies = [CAT | {"prompt": f"cat {index}", "seed": index, "n": 1 + index % 2} for index in range(10)]
    batch = begun(client, jsonl(bodies), metadata={"night": "1"})
    assert (batch.object, batch.endpoint, batch.completion_window) == ("batch", GENERATIONS, "24h")
    assert (batch.expires_at or 0) - batch.created_at == 86_400
    done = ended(client, batch.id)
    assert (done.status, done.errors, done.error_file_id, done.metadata) == ("completed", None, None, {"night": "1"})
    assert counts(done) == {"total": 10, "completed": 10, "failed": 0}
    assert done.created_at <= (done.finalizing_at or 0) <= (done.completed_at or 0)
    found = lines_of(client, done.output_file_id)
    assert [line["custom_id"] for line in found] == [f"line-{index}" for index in range(10)]
    for line, body in zip(found, bodies, strict=True):
        assert (line["error"], line["response"]["status_code"]) == (None, 200)
        expected = server.client.post(GENERATIONS, json=body).json()
        answer = line["response"]["body"]
        assert answer.keys() == expected.keys()
        assert answer | {"created": 0} == expected | {"created": 0}
    file = client.files.retrieve(str(done.output_file_id))
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert file.bytes == len(client.files.content(file.id).content)


def test_edits_and_random_seeds(client: openai.OpenAI) -> None:
    bodies = [{"prompt": "a cat", "image": PHOTO}, {"prompt": "a dog", "images": [{"image_url": PHOTO}]}]
    done = ended(client, begun(client, jsonl(bodies, EDITS), EDITS).id)
    items = [line["response"]["body"]["data"][0] for line in lines_of(client, done.output_file_id)]
    assert [colour_of(item["b64_json"]) for item in items] == [colour(item["seed"]) for item in items]
    assert len({item["seed"] for item in items}) == 2


def test_lines_that_fail_are_in_the_error_file(client: openai.OpenAI) -> None:
    bodies = [CAT, CAT | {"n": 0}, {"no": "prompt"}, CAT | {"image": base64.b64encode(b"no picture").decode()}]
    done = ended(client, begun(client, jsonl(bodies)).id)
    assert done.status == "completed"
    assert counts(done) == {"total": 4, "completed": 1, "failed": 3}
    assert [line["custom_id"] for line in lines_of(client, done.output_file_id)] == ["line-0"]
    failed = lines_of(client, done.error_file_id)
    assert [line["custom_id"] for line in failed] == ["line-1", "line-2", "line-3"]
    assert {line["response"]["status_code"] for line in failed} == {400}
    assert [line["response"]["body"]["error"]["param"] for line in failed] == ["n", "prompt", "image"]


def test_it_is_cancelled(client: openai.OpenAI, server: Server) -> None:
    before = len(server.drawn())
    batch = begun(client, jsonl([CAT] * 4 + [CAT | {"steps": FOR_EVER}] * 16))
    within(TIMEOUT_S, lambda: counts(client.batches.retrieve(batch.id))["completed"] > 0)
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    done = ended(client, batch.id)
    assert done.status == "cancelled"
    drawn, failed = lines_of(client, done.output_file_id), lines_of(client, done.error_file_id)
    assert counts(done) == {"total": 20, "completed": len(drawn), "failed": len(failed)}
    assert len(drawn) + len(failed) == 20
    assert {line["custom_id"] for line in drawn} <= {f"line-{index}" for index in range(4)}
    assert (done.cancelling_at or 0) <= (done.cancelled_at or 0)
    assert {(line["response"], line["error"]["code"]) for line in failed} == {(None, "batch_cancelled")}
    assert len(server.drawn()) - before < 8  # no more than had places
    assert server.client.get("/v1/images/progress").json()["data"] == []
    with pytest.raises(openai.BadRequestError, match="the batch is cancelled"):
        client.batches.cancel(batch.id)


def test_lines_that_find_no_room_leave_their_places_to_other_batches(tmp_path: Path) -> None:
    with Server(tmp_path, "--max-active", "8", "--max-queue", "8") as server, sdk(server) as client:
        (tmp_path / "models" / "few.yaml").write_text(
            "name: few\nparameters:\n  model: some/one\nlimits:\n  max_concurrent: 1\n"
        )
        server.close_gate()
        slow = begun(client, jsonl([{"prompt": f"{GATED} {number}", "model": "few"} | B64 for number in range(12)]))
        within(TIMEOUT_S, lambda: len(server.drawn()) == 1)
        other = ended(client, begun(client, jsonl([CAT | {"model": "m"}])).id)
        assert counts(other) == {"total": 1, "completed": 1, "failed": 0}
        assert counts(client.batches.retrieve(slow.id))["completed"] == 0
        client.batches.cancel(slow.id)
        server.open_gate()
        assert ended(client, slow.id).status == "cancelled"


def test_a_large_batch_fills_neither_queue_nor_memory(client: openai.OpenAI, server: Server) -> None:
    """At most as many lines stand in the queue as pictures are drawn, of all batches together; others draw first."""
    server.close_gate()
    batches = [begun(client, jsonl([CAT | {"prompt": GATED}] * 500)) for _ in range(2)]
    before = len(server.drawn())
    within(TIMEOUT_S, lambda: len(server.client.get("/v1/images/progress").json()["data"]) == 4)
    status = server.client.get("/v1/status").json()
    assert status["line"]["waiting"] <= 4
    assert server.client.post(GENERATIONS, json=CAT | {"prompt": "now"}).status_code == 200
    assert [prompt for prompt, _ in server.drawn()[before:] if prompt == "now"] == ["now"]
    assert len(server.client.get("/v1/images/progress").json()["data"]) == 4
    for batch in batches:
        client.batches.cancel(batch.id)
        assert ended(client, batch.id).status == "cancelled"


def test_files(client: openai.OpenAI) -> None:
    content = jsonl([CAT])
    made = client.files.create(
        file=("prompts.jsonl", content), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (made.bytes, made.filename, made.purpose, made.status) == (
        len(content),
        "prompts.jsonl",
        "batch",
        "processed",
    )
    assert (made.expires_at or 0) - made.created_at == 3600
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).content == content
    others = [uploaded(client, content) for _ in range(3)]
    assert [file.id for file in client.files.list(limit=2)][:4] == [*others[::-1], made.id]  # several pages
    assert [file.id for file in client.files.list(order="asc")][-4:] == [made.id, *others]
    assert made.id not in [file.id for file in client.files.list(purpose="batch_output")]
    assert client.files.delete(made.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match="you have no file"):
            call(made.id)
    with pytest.raises(openai.BadRequestError, match="is no file of yours"):
        client.batches.create(input_file_id=made.id, endpoint=GENERATIONS, completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="last id of the previous page"):
        client.files.list(after=made.id)


def test_a_deleted_output_leaves_its_batch(client: openai.OpenAI) -> None:
    file = uploaded(client, jsonl([CAT, {"no": "prompt"}]))
    batch = client.batches.create(input_file_id=file, endpoint=GENERATIONS, completion_window="24h")
    client.files.delete(file)  # the batch has what it needs
    done = ended(client, batch.id)
    client.files.delete(str(done.output_file_id))
    assert client.batches.retrieve(batch.id) == done
    assert len(lines_of(client, done.error_file_id)) == 1


@pytest.mark.parametrize("purpose", ["fine-tune", "assistants", "user_data"])
def test_other_purposes_are_refused_by_name(client: openai.OpenAI, purpose: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=f"purpose: '{purpose}'.*batch and vision are valid"):
        client.files.create(file=("a.jsonl", b"{}"), purpose=purpose)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/chat/completions"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"key": "x" * 513}}, "metadata"),
        ({"metadata": {str(index): "" for index in range(17)}}, "metadata"),
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after"),
        ({"webhook": "https://example.com"}, "webhook"),
    ],
)
def test_a_wrong_batch_is_refused(client: openai.OpenAI, server: Server, change: dict[str, Any], param: str) -> None:
    body = {"input_file_id": uploaded(client, jsonl([CAT])), "endpoint": GENERATIONS, "completion_window": "24h"}
    answer = server.client.post("/v1/batches", json=body | change)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


GOOD = jsonl([CAT])


@pytest.mark.parametrize(
    ("content", "line", "code", "param"),
    [
        (b"", None, "empty_file", None),
        (b"\n  \n", None, "empty_file", None),
        (GOOD + b"no json\n", 2, "invalid_json_line", None),
        (GOOD + b"\n\n[1]\n", 4, "invalid_json_line", None),
        (b"[" * 1000, 1, "invalid_json_line", None),
        (b"\xff\xfe", 1, "invalid_json_line", None),
        (GOOD + GOOD, 2, "duplicate_custom_id", "custom_id"),
        (jsonl([CAT], EDITS), 1, "invalid_url", "url"),
        (jsonl([CAT], method="GET"), 1, "invalid_method", "method"),
        (jsonl([CAT], custom_id=""), 1, "invalid_custom_id", "custom_id"),
        (jsonl([CAT], custom_id="a\0"), 1, "invalid_custom_id", "custom_id"),
        (jsonl([CAT | {"model": "\0"}]), 1, "invalid_request", "body.model"),
        (jsonl([CAT], headers={}), 1, "unknown_parameter", "headers"),
        (GOOD.replace(b"body", b"text"), 1, "missing_required_parameter", "body"),
        (jsonl([CAT], body="a cat"), 1, "invalid_request", "body"),
        (jsonl([CAT | {"stream": True}]), 1, "invalid_request", "body.stream"),
        (jsonl([CAT | {"model": ["m"]}]), 1, "invalid_request", "body.model"),
        (jsonl([CAT, CAT | {"model": "m"}]), 2, "mismatched_model", "body.model"),
        (jsonl([CAT | {"prompt": "x " * 5 * 2**20}]), 1, "request_too_large", None),
        (jsonl([CAT | {"loras": [1] * 30_000}]), 1, "invalid_value", None),
    ],
)  # fmt: skip
def test_a_wrong_input_fails_before_anything_is_drawn(
    client: openai.OpenAI, server: Server, content: bytes, line: int | None, code: str, param: str | None
) -> None:
    before = server.drawn()
    batch = begun(client, content)
    assert (batch.status, batch.in_progress_at, batch.output_file_id) == ("failed", None, None)
    assert batch.failed_at
    assert batch.errors
    assert batch.errors.data
    (error,) = batch.errors.data
    assert (error.line, error.code, error.param) == (line, code, param), error
    assert error.message
    assert client.batches.retrieve(batch.id) == batch
    assert server.drawn() == before


def test_an_input_has_at_most_50000_lines() -> None:
    body = json.dumps({"prompt": "a cat"})
    content = "".join(
        f'{{"custom_id": "{index}", "method": "POST", "url": "{GENERATIONS}", "body": {body}}}\n'
        for index in range(lines.MAX_LINES + 1)
    ).encode()
    found, _, errors = lines.read(content, GENERATIONS, 2**20)
    assert len(found) == lines.MAX_LINES
    assert [(error["line"], error["code"]) for error in errors] == [(lines.MAX_LINES + 1, "too_many_lines")]
    few = content[: content.rindex(b"{", 0, -100)]
    assert lines.read(few, GENERATIONS, 2**20)[2] == []
    many = b"no json\n" * 1000
    assert len(lines.read(many, GENERATIONS, 2**20)[2]) == lines.MAX_ERRORS


def test_batches_are_listed_by_pages(client: openai.OpenAI) -> None:
    made = [begun(client, jsonl([CAT])).id for _ in range(3)]
    assert [batch.id for batch in client.batches.list(limit=2)][:3] == made[::-1]
    with pytest.raises(openai.NotFoundError, match="you have no batch"):
        client.batches.retrieve("batch_none")


def test_everybody_sees_their_own(tmp_path: Path) -> None:
    keys = "alice:alice-key,bob:bob-key"
    with (
        Server(tmp_path, "--api-keys", keys) as server,
        sdk(server, "alice-key") as alice,
        sdk(server, "bob-key") as bob,
    ):
        batch = begun(alice, jsonl([CAT | {"response_format": "url"}]))
        done = ended(alice, batch.id)
        url = lines_of(alice, done.output_file_id)[0]["response"]["body"]["data"][0]["url"]
        assert url.startswith(f"{server.url}/generated-images/")
        for call, id in (
            (bob.batches.retrieve, batch.id),
            (bob.batches.cancel, batch.id),
            (bob.files.retrieve, batch.input_file_id),
            (bob.files.content, done.output_file_id),
            (bob.files.delete, done.output_file_id),
        ):
            with pytest.raises(openai.NotFoundError):
                call(str(id))
        with pytest.raises(openai.BadRequestError):
            bob.batches.create(input_file_id=batch.input_file_id, endpoint=GENERATIONS, completion_window="24h")
        assert (bob.files.list().data, bob.batches.list().data) == ([], [])
        assert len(alice.files.list().data) == 2


def test_limits_of_a_caller(tmp_path: Path) -> None:
    with Server(tmp_path, "--files-max-mb", "1") as server, sdk(server) as client:
        uploaded(client, jsonl([CAT | {"user": "x" * 700_000}]))
        with pytest.raises(openai.APIStatusError, match="files_max_mb") as refused:
            uploaded(client, jsonl([CAT | {"user": "x" * 700_000}]))
        assert refused.value.status_code == 413
        file = uploaded(client, jsonl([CAT | {"prompt": "noise", "n": 2}] * 20 + [CAT | {"prompt": GATED}]))
        many = client.batches.create(input_file_id=file, endpoint=GENERATIONS, completion_window="24h")
        server.open_gate()
        assert ended(client, many.id).status == "completed"
        server.close_gate()
        waiting = [begun(client, jsonl([CAT | {"prompt": GATED}])) for _ in range(20)]
        with pytest.raises(openai.RateLimitError, match="have not ended"):
            begun(client, jsonl([CAT]))
        client.batches.cancel(waiting[0].id)
        ended(client, waiting[0].id)
        begun(client, jsonl([CAT]))


def test_a_key_has_no_effect_on_a_batch_and_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Idempotency-Key: it has no effect here"):
        begun(client, jsonl([CAT]), extra_headers={"idempotency-key": "x"})


def test_limits_are_kept_when_two_write_at_once_and_deleted_files_give_room_back(tmp_path: Path) -> None:
    """From the first look at the limit on, no other process may write."""
    jobs = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}", max_age_s=3600, max_bytes=2**20)
    files = FileStore(jobs, max_bytes=2**26)
    batches = BatchStore(jobs, files, max_age_s=3600)
    assert files.get("a\0", None) is None
    assert batches.get("a\0") is None
    refused: list[str] = []

    def look(_: Any, __: Any, statement: str, *more: Any) -> None:
        if "count" in statement and not refused:
            other = sqlite3.connect(tmp_path / "jobs.db", timeout=0)
            with pytest.raises(sqlite3.OperationalError) as error:
                other.execute("BEGIN IMMEDIATE")
            other.close()
            refused.append(str(error.value))

    sql.event.listen(jobs.engine, "before_cursor_execute", look)
    content = bytes(range(256)) * (5 * 2**20 // 256)
    file = StoredFile(
        id="file-1", caller="c", purpose="batch", filename="a", created=1.0, expires=2.0, bytes=len(content)
    )
    files.add(file, content)
    assert refused == ["database is locked"]
    assert [len(piece) for piece in files.pieces(file)] == [2**22, 2**20]
    assert b"".join(files.pieces(file)) == content
    assert batches.expire(3.0) == 1
    assert list(files.pieces(file)) == []
    with jobs.begin() as connection:
        assert connection.exec_driver_sql("PRAGMA freelist_count").scalar() == 0
        assert connection.exec_driver_sql("PRAGMA secure_delete").scalar() == 0
    jobs.close()


def test_a_large_batch_is_written_in_portions(tmp_path: Path) -> None:
    """So that a job which is accepted meanwhile waits for one of them, and not for all lines."""
    jobs = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}", max_age_s=3600, max_bytes=2**20)
    files = FileStore(jobs, max_bytes=2**26)
    batches = BatchStore(jobs, files, max_age_s=3600)
    portions: dict[int, int] = {}
    most = [0]

    def begun_by(connection: Any) -> None:
        portions[id(connection)] = connection.connection.driver_connection.total_changes

    def committed(connection: Any) -> None:
        changes = connection.connection.driver_connection.total_changes - portions[id(connection)]
        most[0] = max(most[0], changes)

    sql.event.listen(jobs.engine, "begin", begun_by)
    sql.event.listen(jobs.engine, "commit", committed)
    count = 3 * CHUNK + 5
    batch = stored_batch(jobs.server, count)
    batches.create(batch, [Line(position=index, custom_id=str(index), body=b"{}") for index in range(count)])
    assert [each.id for each in batches.claim()[0]] == [batch.id]
    assert batches.finish(batch, "cancelled", 2.0)
    done = batches.get(batch.id)
    assert done
    assert (done.state, done.failed) == ("cancelled", count)
    assert files.delete(files.get(str(done.error_file), None))  # type: ignore[arg-type]
    assert batches.expire(1e9) == 0
    assert batches.get(batch.id) is None
    with jobs.begin() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM lines").scalar() == 0
    assert CHUNK <= most[0] <= CHUNK + 2
    jobs.close()


def test_a_batch_whose_lines_are_not_all_there_is_none(tmp_path: Path) -> None:
    """Its server died, or its disk was full, while they were inserted: nobody was told of it."""
    jobs = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}", max_age_s=3600, max_bytes=2**20)
    batches = BatchStore(jobs, FileStore(jobs, max_bytes=2**26), max_age_s=3600)
    batch = stored_batch(jobs.server, 2)
    with pytest.raises(JobsUnavailable):
        batches.create(batch, [Line(position=index, custom_id="a", body=(5,)) for index in range(2)])  # type: ignore[arg-type]
    assert batches.get(batch.id) is None
    assert batches.page(None, after=None, limit=10) == ([], False)
    with jobs.begin() as connection:
        assert connection.exec_driver_sql("SELECT state FROM batches").scalar() == "validating"
    assert batches.claim()[0] == []
    with jobs.begin() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM batches").scalar() == 0
    jobs.close()


@pytest.mark.parametrize("by_itself", [True, False])
def test_a_batch_that_is_complete_since_a_look_began_keeps_its_lines(tmp_path: Path, by_itself: bool) -> None:
    """The look of its own server, or of one to which that one seems dead."""
    own, other = (batches_of(tmp_path) for _ in range(2))
    looking = own if by_itself else other
    batch = stored_batch(own.server, 2)
    inserted, begun, seen = threading.Event(), threading.Event(), threading.Event()

    def before_completion(_: Any, __: Any, statement: str, *more: Any) -> None:
        if statement.startswith("INSERT INTO lines"):
            inserted.set()
        elif statement.startswith("INSERT INTO servers") and inserted.is_set() and not begun.is_set():
            begun.set()
            assert seen.wait(TIMEOUT_S)

    def between(_: Any, __: Any, statement: str, *more: Any) -> None:
        if "FROM servers" in statement and not seen.is_set():
            seen.set()
            creation.result(TIMEOUT_S)

    sql.event.listen(own._jobs.engine, "before_cursor_execute", before_completion)
    sql.event.listen(looking._jobs.engine, "after_cursor_execute", between)
    with ThreadPoolExecutor() as pool:
        creation = pool.submit(own.create, batch, lines_for(2))
        assert begun.wait(TIMEOUT_S)
        if not by_itself:
            own._jobs.leave()
        assert looking.claim()[0] == []
    assert own.pending(batch.id, -1, 10) == [0, 1]
    assert [each.id for each in own.claim()[0]] == [batch.id]
    for each in (own, other):
        each._jobs.close()


def test_a_batch_that_another_server_drops_is_not_accepted_and_leaves_nothing(tmp_path: Path) -> None:
    own, other = (batches_of(tmp_path) for _ in range(2))

    class Slow(list[Line]):
        """By the second portion this server was silent for too long."""

        def __getitem__(self, at: Any) -> Any:
            if at.start:
                own._jobs.leave()
                assert other.claim()[0] == []
            return super().__getitem__(at)

    with pytest.raises(JobsUnavailable, match="took too long"):
        own.create(stored_batch(own.server, CHUNK + 1), Slow(lines_for(CHUNK + 1)))
    with other._jobs.begin() as connection:
        for table in ("batches", "lines"):
            assert connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar() == 0
    for each in (own, other):
        each._jobs.close()


def test_a_cancelled_line_that_waits_for_a_place_waits_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It found the queue full, and lines of other batches have all places since."""
    monkeypatch.setattr(jobs_module, "AGAIN_S", 0.0)
    nothing: Any = None
    batches, batch = Batches(nothing, nothing, places=lambda: 1), stored_batch("s", 1)

    async def cancelled() -> None:
        active, run, places = _Active(batch), Run(batch.job(0), promised=True), batches._places
        await places.take()
        other = asyncio.create_task(places.take())
        pausing = asyncio.create_task(batches._pause(active, run))
        await other
        for _ in range(100):  # its pause is over
            await asyncio.sleep(0)
        assert places._waiting
        run.cancelled.set()
        await asyncio.wait_for(pausing, TIMEOUT_S)
        assert run in active.refused  # it has none to give back
        places.give()
        await asyncio.wait_for(places.take(), TIMEOUT_S)

    asyncio.run(cancelled())


def batches_of(folder: Path) -> BatchStore:
    """Of one server; several share the database."""
    jobs = JobStore(f"sqlite:///{folder / 'jobs.db'}", max_age_s=3600, max_bytes=2**20)
    return BatchStore(jobs, FileStore(jobs, max_bytes=2**26), max_age_s=3600)


def lines_for(count: int) -> list[Line]:
    return [Line(position=index, custom_id=str(index), body=b"{}") for index in range(count)]


def stored_batch(server: str, total: int) -> StoredBatch:
    return StoredBatch(
        id="batch_1", caller="c", secret="s", server=server, state="in_progress", created=1.0, expires=9e9,
        endpoint=GENERATIONS, input_file="file-1", keep_s=3600, model=None, details={}, errors=[], request={},
        total=total,
    )  # fmt: skip
