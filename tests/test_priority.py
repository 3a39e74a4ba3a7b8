"""Priority and deadlines: who yields to whom, at which step, and that nobody's pixels depend on it."""

from __future__ import annotations

import asyncio
import base64
import io
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sfumato.batching import interruption
from sfumato.batching.batcher import Batcher
from sfumato.batching.policy import LOW_EVERY, low_bound
from sfumato.batching.task import State, Task
from sfumato.batching.verification import Verification
from sfumato.batching.views import View, view
from sfumato.core import BATCH, INTERACTIVE, Done
from sfumato.engine.loop import Loop
from sfumato.engine.protocol import Answer, Report, Stop, Submit
from sfumato.errors import DeadlineExceeded, TooManyRequests
from sfumato.residency.idle_times import IdleTimes
from sfumato.residency.pool import LOW_PATIENCE_S
from sfumato.serving.catalog import Catalog
from sfumato.serving.planning import ImageRequest
from sfumato.serving.queue import UNHURRIED_S, Queue, Ticket
from sfumato.serving.service import Service
from sfumato.settings import Settings
from support import here, loads, tiny
from support.fake_engine import FakeEngine
from support.held import Held
from support.inside import Inside
from support.serving import Server

STEPS = 4
CALL: dict[str, Any] = {"width": 32, "height": 32, "output_type": "pt"}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Drawn:
    """A pipeline that notes in `computed` which of its modules computed."""

    def __init__(self, name: str, computed: list[str], seed: int) -> None:
        self.pipe = tiny.stable_diffusion(seed)
        self.pipe.safety_checker = None
        self.pipe.set_progress_bar_config(disable=True)
        for module in (self.pipe.unet, self.pipe.vae.decoder, self.pipe.text_encoder):
            module.register_forward_hook(lambda *_: computed.append(name))

    def draw(self, pipe: Any, seed: int, steps: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return pipe(f"picture {seed}", num_inference_steps=steps, generator=generator, **CALL).images

    def submit(self, batcher: Batcher, seed: int, steps: int, *, low: bool = False) -> Task:
        task = batcher.submit(lambda: self.draw(view(self.pipe), seed, steps), low=low)
        task.steps = task.steps_left = steps
        return task


def finish(batcher: Batcher) -> None:
    while batcher.step():
        pass


# At each step.


def test_a_picture_that_yields_at_any_step_is_the_undisturbed_one_bit_for_bit() -> None:
    """The interactive request has a model of its own, so nobody rides along."""
    computed: list[str] = []
    low, high = Drawn("low", computed, 0), Drawn("high", computed, 1)
    alone = low.draw(low.pipe, 1, STEPS)
    forwards = len(computed)
    assert forwards > STEPS
    for at in range(forwards):
        batcher = Batcher(verification=Verification())
        yielding = low.submit(batcher, 1, STEPS, low=True)
        for _ in range(at):
            batcher.step()
        assert yielding.state is State.PARKED or at == 0
        computed.clear()
        hurried = high.submit(batcher, 2, 2)
        while not hurried.done:
            batcher.step()
        assert set(computed) == {"high"}, "not one module of the other in between"
        assert not yielding.done
        finish(batcher)
        assert yielding.outcome is not None
        assert yielding.outcome.error is None
        assert torch.equal(yielding.outcome.value, alone), at


def test_the_same_picture_beside_interactive_ones_of_its_own_model() -> None:
    """It rides along in their forward passes, where it is worth it; what is left is rounding."""
    model = Drawn("", [], 0)
    alone = model.draw(model.pipe, 1, STEPS)
    for at in range(STEPS + 2):
        batcher = Batcher(verification=Verification())
        yielding = model.submit(batcher, 1, STEPS, low=True)
        for _ in range(at):
            batcher.step()
        others = [model.submit(batcher, seed, 3) for seed in (2, 3)]
        finish(batcher)
        assert yielding.outcome is not None
        torch.testing.assert_close(yielding.outcome.value, alone, rtol=0, atol=1e-4)
        assert all(task.outcome and task.outcome.error is None for task in others)


# Nobody starves.


class Halving(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample * self.weight


def stepping(module: Any, steps: int) -> torch.Tensor:
    value = torch.ones(2, 3)
    for _ in range(steps):
        value = module(value)
    return value


def test_low_requests_go_on_while_interactive_ones_never_end() -> None:
    batcher = Batcher(verification=Verification("unlisted", frozenset()))
    lows = [View("").stand_in(Halving(), f"low {n}") for n in range(3)]
    high = View("").stand_in(Halving(), "high")
    waiting = [batcher.submit(lambda each=each: stepping(each, 4), low=True) for each in lows]
    hurried = [batcher.submit(lambda steps=steps: stepping(high, steps)) for steps in (3, 4, 5)]
    drawn = 0
    while not all(task.done for task in waiting):
        batcher.step()
        assert batcher.now <= 4 * (low_bound(3) + 1)
        for task in [task for task in hurried if task.done]:
            hurried.remove(task)
            hurried.append(batcher.submit(lambda: stepping(high, 5)))
            drawn += 1
    assert drawn > 10
    assert batcher.now > 4 * 3 * (LOW_EVERY - 1), "and not before, as others were waiting all the time"
    batcher.close(RuntimeError("the test is over"))


def test_no_interactive_request_waits_for_the_place_of_another() -> None:
    batcher = Batcher(max_active=2, verification=Verification("unlisted", frozenset()))
    module = View("").stand_in(Halving(), "module")
    low = [batcher.submit(lambda: stepping(module, 50), low=True) for _ in range(3)]
    for _ in range(3):
        batcher.step()
    assert [task.state for task in low] == [State.PARKED, State.QUEUED, State.QUEUED]
    high = [batcher.submit(lambda: stepping(module, 2)) for _ in range(3)]
    batcher.step()
    assert [task.state is State.QUEUED for task in high] == [False, False, True]
    finish(batcher)
    assert all(task.outcome and task.outcome.error is None for task in (*low, *high))


def test_the_loop_tells_the_batcher(
    repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures of one model begin together: the one that is due is done first, the one that yields last."""
    config = here.config(tmp_path, repositories["nitrosocke/Ghibli-Diffusion"])
    ended: list[str] = []
    # A decode that a busy machine makes long would let others go first.
    monkeypatch.setattr(interruption, "SHORTEST_S", math.inf)

    def send(report: Report) -> None:
        if isinstance(report, Answer) and isinstance(report.event, Done):
            ended.append(report.id)

    # One row a forward pass: nobody rides along.
    loop = Loop(Settings(device="cpu", data=tmp_path / "data", log_level="error", max_batch=1), send)
    for id, steps, priority, deadline in (
        ("low", 2, BATCH, None),
        ("late", 2, INTERACTIVE, None),
        ("due", 6, INTERACTIVE, 5.0),
    ):
        loop.post(Submit(config, here.asked(id=id, steps=steps, priority=priority, deadline=deadline)))
    loop.post(Stop())
    loop.run()
    assert ended == ["due", "late", "low"]


# The queue.


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def called(tickets: list[Ticket]) -> list[bool]:
    return [ticket.called.is_set() for ticket in tickets]


def test_low_pictures_take_half_as_many_places_and_none_of_the_others() -> None:
    queue = Queue(4, 100)
    low = queue.join("ann", 10, low=True) + queue.join("bob", 1, low=True)
    assert called(low) == [True] + [False] * 9 + [True], "the last place is kept for a caller without any"
    high = [queue.join(caller, 1)[0] for caller in "abcd"]
    assert all(called(high))
    assert (queue.running_of(False), queue.running_of(True), queue.running) == (4, 2, 6)
    assert (queue.waiting_of(False), queue.waiting_of(True)) == (0, 9)


def test_low_pictures_are_called_when_no_other_waits_and_one_always() -> None:
    queue = Queue(2, 100)
    high = [queue.join(caller, 1)[0] for caller in "abc"]
    low = [queue.join(caller, 1, low=True)[0] for caller in "de"]
    assert called([*high, *low]) == [True, True, False, True, False]
    assert [queue.position(each) for each in (high[2], low[1])] == [1, 2]
    queue.leave(low[0], drawn=True)
    assert called([high[2], low[1]]) == [False, True], "there is always one, however many others come"
    queue.leave(high[0], drawn=True)
    assert high[2].called.is_set()


def test_a_queue_full_of_low_pictures_refuses_no_interactive_one() -> None:
    queue = Queue(1, 4)
    queue.join("ann", 5, low=True)
    with pytest.raises(TooManyRequests):
        queue.join("ann", 1, low=True)
    interactive = queue.join("ann", 5)
    with pytest.raises(TooManyRequests):
        queue.join("ann", 1)
    assert sum(called(interactive)) == 1


def test_times_are_told_of_each_class() -> None:
    clock = Clock()
    queue = Queue(2, 100, clock)
    slow, quick = queue.join("a", 1, low=True)[0], queue.join("b", 1)[0]
    clock.now += 2
    queue.leave(quick, drawn=True)
    assert (queue.mean_s(), queue.mean_s(True)) == (2, 2), "what is not known of one is guessed by the other"
    clock.now += 98
    queue.leave(slow, drawn=True)
    assert (queue.mean_s(), queue.mean_s(True)) == (2, 100)
    queue.join("x", 9)
    assert (queue.wait_s(8), queue.wait_s(9, low=True)) == (8, 108), "eight of the others, and one of its own"
    assert (queue.retry_after(), queue.retry_after(low=True)) == (9, 120)


def test_the_earliest_deadline_of_a_caller_is_called_first_and_no_other_caller_waits_for_it() -> None:
    clock = Clock()
    queue = Queue(1, 100, clock)
    (drawn,) = queue.join("z", 1)
    plain = queue.join("ann", 1)[0]
    late, soon = (queue.join("ann", 1, due_in_s=seconds)[0] for seconds in (100.0, 10.0))
    far = queue.join("ann", 1, due_in_s=1e6)[0]
    bob = queue.join("bob", 1)[0]
    assert [queue.position(each) for each in (soon, late, plain, far, bob)] == [1, 3, 4, 5, 2]
    clock.now += UNHURRIED_S
    hurried = queue.join("ann", 1, due_in_s=0.001)[0]
    assert queue.position(plain) < queue.position(hurried), "nobody is overtaken for ever"
    for ticket in (drawn, plain, late, soon, far, bob, hurried):
        queue.leave(ticket, drawn=False)
    assert (queue.waiting, queue.running) == (0, 0)


# The service.


@pytest.fixture
def service(tmp_path: Path) -> Service:
    (tmp_path / "m.yaml").write_text("name: m\nparameters:\n  model: some/one\nlimits:\n  max_concurrent: 1\n")
    (tmp_path / "n.yaml").write_text("name: n\nparameters:\n  model: some/two\n")
    return Service(Catalog([tmp_path]), FakeEngine(), Settings(max_active=1))


def engine_of(service: Service) -> FakeEngine:
    assert isinstance(service.engine, FakeEngine)
    return service.engine


def wanted(**fields: Any) -> ImageRequest:
    return ImageRequest(**{"prompts": ["a cat"], "model": "n", "n": 1, **fields})


def test_what_waits_past_its_deadline_is_refused_and_what_has_begun_is_drawn(service: Service) -> None:
    engine = engine_of(service)

    async def run() -> None:
        engine.hold = asyncio.Event()
        begun = await service.submit(wanted(deadline=_soon(3600)))
        await engine.arrived.get()
        waiting = await service.submit(wanted(deadline=_soon(0.01)))
        with pytest.raises(DeadlineExceeded, match="deadline"):
            await waiting.pictures()
        assert waiting.progress().state == "failed"
        begun.deadline = _soon(-1)  # as if it had passed meanwhile
        engine.hold.set()
        (done,) = await begun.pictures()
        assert [warning for warning in done.warnings if warning.startswith("deadline: ")]
        (quick,) = await (await service.submit(wanted(deadline=_soon(3600)))).pictures()
        assert quick.warnings == ()
        assert (service.queue.running, service.queue.waiting) == (0, 0)

    asyncio.run(run())
    assert [generation.deadline is not None for generation in engine.seen] == [True, True]


def _soon(seconds: float) -> float:
    return time.time() + seconds


def test_batch_requests_count_against_no_interactive_one(service: Service) -> None:
    engine = engine_of(service)

    async def run() -> None:
        engine.hold = asyncio.Event()
        slow = await service.submit(wanted(model="m", priority=BATCH))
        quick = await service.submit(wanted(model="m"))
        for priority in (BATCH, INTERACTIVE):
            with pytest.raises(TooManyRequests, match="max_concurrent"):
                await service.submit(wanted(model="m", priority=priority))
        engine.hold.set()
        assert len(await slow.pictures() + await quick.pictures()) == 2

    asyncio.run(run())
    assert [generation.priority for generation in engine.seen] == [BATCH, INTERACTIVE]


# HTTP.


def _picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "orange").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


PHOTO = _picture()
CAT: dict[str, Any] = {"prompt": "a cat", "model": "m"}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/images/generations": {"model": "m", "prompt": "a cat"},
    "/v1/images/edits": {"model": "m", "prompt": "a cat", "image": PHOTO},
    "/v1/images/variations": {"model": "m", "image": PHOTO},
    "/v1/images/inpainting": {"model": "m", "prompt": "a cat", "image": PHOTO, "mask": PHOTO},
    "/v1/images/upscale": {"image": PHOTO, "scale": 4, "model": "m"},
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "a cat"}]},
    "/sdapi/v1/txt2img": {"model": "m", "prompt": "a cat"},
    "/sdapi/v1/img2img": {"model": "m", "prompt": "a cat", "init_images": [PHOTO]},
    "/sdapi/v1/extra-single-image": {"image": PHOTO, "upscaling_resize": 4, "upscaler_1": "enlarge"},
    "/api/generate": {"model": "m", "prompt": "a cat", "stream": False},
    "/models/m": {"inputs": "a cat"},
}


@pytest.fixture
def inside(tmp_path: Path) -> Inside:
    inside = Inside(tmp_path)
    (tmp_path / "models" / "enlarge.yaml").write_text(
        "name: enlarge\nparameters:\n  model: some/other\ndiffusers:\n"
        "  pipeline_type: StableDiffusionUpscalePipeline\n  enable_parameters: image\n"
    )
    return inside


@pytest.mark.parametrize("route", ROUTES)
def test_each_drawing_route_takes_a_priority_and_a_deadline(inside: Inside, route: str) -> None:
    def sent(value: str) -> dict[str, Any]:
        body = dict(ROUTES[route])
        if "inputs" in body:
            return body | {"parameters": {"priority": value}}
        return body | {"priority": value}

    with inside.client() as client:
        answer = client.post(route, json=sent("batch"), headers={"X-Deadline-Ms": "600000"})
        assert answer.status_code == 200, answer.text
        assert "priority" not in answer.headers.get("x-sfumato-ignored", "")
        assert client.post(route, json=ROUTES[route]).status_code == 200
        wrong = client.post(route, json=sent("urgent"))
        assert wrong.status_code == 400
        assert all(word in wrong.text for word in ("priority", "urgent", "interactive and batch are valid"))
        for value in ("soon", "0", "-5", "1.5", "5_000", "1e3", "inf", "86400001", ""):
            late = client.post(route, json=ROUTES[route], headers={"X-Deadline-Ms": value})
            assert late.status_code == 400, value
            assert "x-deadline-ms" in late.text
        twice = client.post(route, json=ROUTES[route], headers=[("X-Deadline-Ms", "600000")] * 2)
        assert (twice.status_code, "x-deadline-ms: the header occurs 2 times" in twice.text) == (400, True)
    first, second = inside.engine.seen
    assert (first.priority, second.priority) == (BATCH, INTERACTIVE)
    assert first.deadline is not None
    assert second.deadline is None


@pytest.mark.parametrize(
    ("fields", "priority"),
    [
        ({"service_tier": "flex"}, BATCH),
        ({"service_tier": "priority"}, INTERACTIVE),
        ({"service_tier": "auto"}, INTERACTIVE),
        ({"priority": "BATCH"}, BATCH),
        ({"priority": ""}, INTERACTIVE),
        ({"priority": None}, INTERACTIVE),
    ],
)
def test_openais_tiers_are_read_and_none_is_above_the_default(
    inside: Inside, fields: dict[str, Any], priority: str
) -> None:
    with inside.client() as client:
        assert client.post("/v1/images/generations", json=CAT | fields).status_code == 200
        assert client.post("/v1/images/generations", json=CAT | {"priority": 5}).status_code == 400
    assert inside.engine.seen[-1].priority == priority


def test_metrics_tell_the_classes_apart(inside: Inside) -> None:
    with inside.client() as client:
        for priority in ("batch", "interactive", "batch"):
            client.post("/v1/images/generations", json=CAT | {"priority": priority})
        text = client.get("/metrics").text
    assert 'sfumato_queue_wait_seconds_count{priority="batch"} 2.0' in text
    assert 'sfumato_picture_seconds_count{model="m",priority="interactive"} 1.0' in text
    for priority in ("batch", "interactive"):
        assert f'sfumato_queue_depth{{priority="{priority}"}} 0.0' in text
        assert f'sfumato_running_pictures{{priority="{priority}"}} 0.0' in text


# Models that do not fit beside each other.


@pytest.mark.parametrize(
    ("low", "after_s", "overtaken"),
    [(False, 0, False), (True, LOW_PATIENCE_S - 1, True), (True, LOW_PATIENCE_S, False)],
)
def test_a_load_for_low_requests_lets_others_go_first_for_a_while(
    repositories: dict[str, Path], tmp_path: Path, low: bool, after_s: float, overtaken: bool
) -> None:
    """Without that, no request for the model in use would begin until it is idle, and has left."""
    folder = repositories["nitrosocke/Ghibli-Diffusion"]
    configs = {name: here.config(tmp_path, folder, name=name) for name in "ab"}
    clock = Clock()
    pool = loads.pool(1, idle_times=IdleTimes(clock=clock))

    def give_up() -> None:
        raise TimeoutError

    begun, turns = False, 0

    def waiting() -> None:
        """Another request for the model in use comes while one waits for that model's room."""
        nonlocal begun, turns
        turns += 1
        if turns == 1:
            loads.turn()  # until it is known what the load needs
            clock.now += after_s
            return
        with suppress(TimeoutError), pool.use(configs["a"], give_up):
            begun = True
        raise TimeoutError

    with (
        pool.use(configs["a"], loads.turn),
        pytest.raises(TimeoutError),
        pool.use(configs["b"], waiting, low=low),
    ):
        pytest.fail("there is no room for it")
    assert begun is overtaken


# A server.


def test_an_interactive_picture_overtakes_a_batch_in_flight(server: Server) -> None:
    """Nine batch pictures of 900 steps are queued or drawn; they would take many minutes."""
    long = {"prompt": "a cat", "steps": 900, "size": "128x128", "n": 9, "priority": "batch"}
    with Held(server, long) as batch:
        batch.drawing(3)
        before = batch.progress()
        answer = server.draw(prompt="a dog", steps=8, size="128x128", seed=4)
        assert answer.status_code == 200
        after = batch.progress()
        assert after["status"] == "drawing"
        assert after["pictures_done"] == 0
        assert after["step"] >= before["step"], "it keeps what it has"
        batch.until(lambda seen: seen["step"] > after["step"])  # and goes on
