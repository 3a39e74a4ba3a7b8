"""What a request becomes: checked, split, in order; over an engine that draws nothing."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.commands.generate import _as_request as as_request
from sfumato.core import MAX_SEED, Done, Limits
from sfumato.errors import Cancelled, DrawError, InvalidRequest, ModelNotFound, RequestNotFound, TooManyRequests
from sfumato.sampling import Sampling, nested
from sfumato.serving.catalog import Catalog
from sfumato.serving.planning import ImageRequest, refuse_size, size_of
from sfumato.serving.service import Service
from sfumato.settings import Settings
from support.fake_engine import FakeEngine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.yaml").write_text("name: a\nparameters:\n  model: some/one\nlimits:\n  max_concurrent: 2\n")
    (tmp_path / "b.yaml").write_text("name: b\nparameters:\n  model: some/two\n  seed: 5\n  n: 3\n")
    return tmp_path


@pytest.fixture
def service(folder: Path) -> Service:
    return Service(Catalog([folder]), FakeEngine(), Settings())


def draw(service: Service, prompt: Any = "a cat", **fields: Any) -> list[Done]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    return asyncio.run(service.draw(ImageRequest(prompts=prompts, **nested(fields))))


def engine_of(service: Service) -> FakeEngine:
    assert isinstance(service.engine, FakeEngine)
    return service.engine


def test_n_pictures_are_n_generations(service: Service) -> None:
    drawn = draw(service, n=3, seed=7)
    assert [done.recipe.seed for done in drawn] == [7, 8, 9]
    assert len({generation.id for generation in engine_of(service).seen}) == 3


def test_each_prompt_of_a_list_is_drawn_n_times(service: Service) -> None:
    drawn = draw(service, ["one", "two"], n=2, seed=0)
    made = [(done.recipe.prompt, done.recipe.seed) for done in drawn]
    assert made == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]


def test_what_changed_the_pixels_of_a_picture_is_asked_for_again(service: Service) -> None:
    """`--like`: tiles, and not where modules waited, which is the other machine's business."""
    (done,) = draw(service, seed=1)
    made = replace(done.recipe, sampling=Sampling(width=64, height=64), savings=("offload", "vae_tiling"))
    asyncio.run(service.draw(ImageRequest(**as_request(made))))
    assert engine_of(service).seen[-1].savings == ("vae_tiling",)
    assert engine_of(service).seen[0].savings == ()


def test_a_bar_in_the_prompt_of_a_picture_stays_there(service: Service) -> None:
    """`--like`: AUTOMATIC1111's routes do not split prompts."""
    (done,) = draw(service, "a [cat|dog]", split_prompt=False)
    asyncio.run(service.draw(ImageRequest(**as_request(done.recipe))))
    again = engine_of(service).seen[-1]
    assert (again.prompt, again.split_prompt) == ("a [cat|dog]", False)


def test_the_files_seed_and_n_hold_until_asked_otherwise(service: Service) -> None:
    assert [done.recipe.seed for done in draw(service, model="b")] == [5, 6, 7]
    assert [done.recipe.seed for done in draw(service, model="b", seed=0, n=1)] == [0]


def test_any_seed_can_be_had_again(service: Service) -> None:
    first, second = draw(service), draw(service, seed=-1)
    assert first[0].recipe.seed != second[0].recipe.seed
    assert draw(service, seed=MAX_SEED)[0].recipe.seed == MAX_SEED


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": 6, "prompt": ["a", "b"]}, "n"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "x" * 32_001}, "prompt"),
        ({"seed": -2}, "seed"),
        ({"seed": MAX_SEED, "n": 2}, "seed"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"clip_skip": -1}, "clip_skip"),
        ({"scheduler": "eulr"}, "scheduler"),
        ({"strength": 0.5}, "strength"),
        ({"mask": "AAAA"}, "mask"),
        ({"width": 64, "height": 10_000}, "size"),
        ({"images": ["AAAA"] * 17}, "image"),
    ],
)
def test_bad_input_names_its_field(service: Service, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        draw(service, **fields)
    assert caught.value.param == param
    assert param in caught.value.message.lower()
    assert engine_of(service).seen == []


@given(st.text(max_size=20))
def test_a_size_is_understood_or_refused(text: str) -> None:
    try:
        width, height = size_of(text)
        if width is not None:
            refuse_size(Limits(2048 * 2048, 4096, 8), width, height, "size")
    except InvalidRequest as error:
        assert error.param == "size"
        return
    assert (width is None) == (height is None)
    assert width is None or min(width, height) > 0


@pytest.mark.parametrize("text", ["64by64", "64", "64x", "x", "-1x64", "64x64x64"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is not WIDTHxHEIGHT") as caught:
        size_of(text)
    assert caught.value.param == "size"


def test_an_unknown_model_is_named_with_those_there_are(service: Service) -> None:
    with pytest.raises(ModelNotFound, match="a, b"):
        draw(service, model="c")


def test_one_failure_fails_the_request_and_stops_its_others(service: Service) -> None:
    engine = engine_of(service)

    async def run() -> None:
        engine.hold = asyncio.Event()
        engine.fail = {1}
        await service.draw(ImageRequest(prompts=["x"], seed=0, n=2, model="b"))

    with pytest.raises(DrawError):
        asyncio.run(run())
    assert sorted(engine.closed) == [0, 1]


def test_a_cancelled_request_closes_its_streams(service: Service) -> None:
    engine = engine_of(service)

    async def run() -> None:
        engine.hold = asyncio.Event()
        stepped = asyncio.Event()
        request = ImageRequest(prompts=["x"], seed=0)
        task = asyncio.create_task(service.draw(request, lambda index, step: stepped.set()))
        await stepped.wait()
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()

    asyncio.run(run())
    assert engine.closed == [0]


def test_a_models_limit_answers_later_requests_with_retry_after(service: Service) -> None:
    engine = engine_of(service)

    async def run() -> None:
        engine.hold = asyncio.Event()
        running = asyncio.create_task(service.draw(ImageRequest(prompts=["x"], model="a", n=2)))
        await engine.arrived.get()
        await engine.arrived.get()
        with pytest.raises(TooManyRequests) as caught:
            await service.draw(ImageRequest(prompts=["x"], model="a"))
        assert 0 < caught.value.retry_after <= 120
        engine.hold.set()
        assert len(await running) == 2
        assert len(await service.draw(ImageRequest(prompts=["x"], model="a"))) == 1

    asyncio.run(run())


def test_a_job_that_is_cancelled_before_it_began_ends_all_the_same(service: Service) -> None:
    async def run() -> None:
        job = await service.submit(ImageRequest(prompts=["x"], id="gone", n=2, model="b"))
        job.cancel()  # its task has not had a turn yet
        with pytest.raises(Cancelled):
            await job.pictures()
        assert (service.queue.running, service.queue.waiting) == (0, 0)
        assert service.jobs() == []
        assert service.progress("gone").state == "cancelled"

    asyncio.run(run())
    assert engine_of(service).seen == []


def test_events_left_early_cancel_the_job(service: Service) -> None:
    engine = engine_of(service)

    async def run() -> None:
        engine.hold = asyncio.Event()
        job = await service.submit(ImageRequest(prompts=["x"], seed=0))
        async with aclosing(job.events()) as events:
            async for _ in events:
                break
        await asyncio.wait([job.task])
        assert isinstance(job.error, Cancelled)

    asyncio.run(run())
    assert engine.closed == [0]


def test_jobs_are_found_by_caller_and_id(service: Service) -> None:
    engine = engine_of(service)

    async def run() -> None:
        engine.hold = asyncio.Event()
        jobs = [await service.submit(ImageRequest(prompts=["x"], caller=caller, id="same")) for caller in "ab"]
        assert service.jobs("a") == jobs[:1]
        assert service.jobs(id="same") == jobs
        assert service.progress("same", "a").caller == "a"
        await service.cancel(service.jobs("a", "same"))
        with pytest.raises(RequestNotFound, match="x-request-id"):
            service.progress("same", "c")
        assert service.progress("same", "a").state == "cancelled"
        engine.hold.set()
        assert len(await jobs[1].pictures()) == 1
        assert service.progress("same").state == "completed"

    asyncio.run(run())


def test_places_come_back_whatever_happens(service: Service) -> None:
    engine = engine_of(service)

    async def run() -> None:
        engine.fail = {1}
        for _ in range(3):
            with pytest.raises(DrawError):
                await service.draw(ImageRequest(prompts=["x"], seed=0, n=3, model="b"))
        assert (service.queue.running, service.queue.waiting) == (0, 0)

    asyncio.run(run())


def test_a_full_line_refuses_and_what_waits_is_drawn(folder: Path) -> None:
    engine = FakeEngine()
    service = Service(Catalog([folder]), engine, Settings(max_active=1, max_queue=1))

    async def run() -> None:
        engine.hold = asyncio.Event()
        drawing, waiting = [await service.submit(ImageRequest(prompts=["x"], n=1, model="b", id=id)) for id in "dw"]
        await engine.arrived.get()
        with pytest.raises(TooManyRequests, match="max_queue"):
            await service.submit(ImageRequest(prompts=["x"], n=1, model="b"))
        assert (drawing.progress().queue_position, waiting.progress().queue_position) == (0, 1)
        assert waiting.progress().state == "queued"
        engine.hold.set()
        assert len(await drawing.pictures() + await waiting.pictures()) == 2
        assert drawing.progress().seconds_left is None

    asyncio.run(run())


@pytest.mark.parametrize("allowed", [False, True])
def test_prompts_are_logged_only_where_a_setting_allows_it(
    folder: Path, caplog: pytest.LogCaptureFixture, allowed: bool
) -> None:
    service = Service(Catalog([folder]), FakeEngine(), Settings(log_prompts=allowed))
    with caplog.at_level("DEBUG"):
        draw(service, "a very private cat")
    assert ": accepted" in caplog.text
    assert ("a very private cat" in caplog.text) == allowed
