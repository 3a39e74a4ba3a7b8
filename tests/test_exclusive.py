"""While a request computes without giving its thread away: who is cancelled ends at the next step, all are heard.

Pipelines that rewire shared modules (perturbed attention, FreeInit), and any while it has changed a module or is in
another state of torch, run so. Commands are posted at a step of the running request, from the loop's own thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sfumato.batching import torch_state
from sfumato.batching.batcher import Batcher
from sfumato.batching.views import View, view
from sfumato.config import ModelConfig
from sfumato.core import Done, Failed, Preview, Step
from sfumato.engine.protocol import Answer, Cancel, Started, Stop
from sfumato.errors import Cancelled
from sfumato.pictures import files
from support import tiny
from support.families_moving import animate_diff_free_init
from support.played import STEPS, Ended, Played, guided, saved


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    return saved(tmp_path_factory.mktemp("models"))


def cancelled(events: list[Any]) -> bool:
    """Exactly one terminal event, and it is this."""
    (last,) = (event for event in events if isinstance(event, Done | Failed))
    return isinstance(last, Failed) and isinstance(last.error, Cancelled) and events[-1] is last


@pytest.mark.parametrize("model", ["pag", "sd"])
@pytest.mark.parametrize("step", [1, 5, STEPS - 1])
def test_a_cancelled_request_takes_at_most_one_more_step(
    configs: dict[str, ModelConfig], model: str, step: int
) -> None:
    def on(play: Played, id: str, event: Any) -> None:
        if id == "victim" and event == Step(step, STEPS):
            play.loop.post(Cancel("victim"))
            play.submit(model, "next", steps=2)
            play.loop.post(Stop())

    play = Played(configs, on)
    play.submit(model, "victim", previews=3)
    play.run()
    events = play.events("victim")
    assert cancelled(events)
    assert sum(isinstance(event, Step) for event in events) <= step + 1
    assert isinstance(play.events("next")[-1], Done)
    assert not any(play.loop._pool._users.values())


def test_others_are_heard_while_one_does_not_switch(configs: dict[str, ModelConfig]) -> None:
    """Of three beside it one waits at a module call, one is done, one has just come: each is answered meanwhile."""

    def on(play: Played, id: str, event: Any) -> None:
        match id, event:
            case "parked", Step(2, _):
                play.submit("pag", "running", previews=3)
            case "running", Step(2, _):
                play.loop.post(Cancel("parked"))
                play.submit("sd", "regretted")
                play.submit("sd", "late", steps=2)
            case "running", Step(4, _):
                play.loop.post(Cancel("regretted"))
            case "running", Step(6, _):
                play.loop.post(Stop())

    play = Played(configs, on)
    play.submit("sd", "parked", steps=60)
    play.run()
    order = [
        (report.id, type(report.event))
        for report in play.sent
        if isinstance(report, Answer) and not isinstance(report.event, Preview)
    ]
    steps = [at for at, (id, kind) in enumerate(order) if (id, kind) == ("running", Step)]
    assert len(steps) == STEPS
    assert steps[1] < order.index(("parked", Failed)) < steps[2]
    assert steps[3] < order.index(("regretted", Failed)) < steps[4]
    assert cancelled(play.events("parked"))
    assert cancelled(play.events("regretted"))
    assert not any(isinstance(report, Started) and report.id == "regretted" for report in play.sent)
    assert isinstance(play.events("running")[-1], Done)
    assert sum(isinstance(event, Preview) for event in play.events("running")) == 3
    assert isinstance(play.events("late")[-1], Done)


def test_a_picture_that_is_done_is_not_held_back_by_one_that_does_not_switch(
    configs: dict[str, ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor if its file is made only then."""
    encode, begun, encoded = files.encode, threading.Event(), threading.Event()

    def late(*arguments: Any) -> bytes:
        assert begun.wait(30)
        encoded.set()
        return encode(*arguments)

    def on(play: Played, id: str, event: Any) -> None:
        if id == "second" and event == Step(2, STEPS):
            begun.set()
            assert encoded.wait(30)
            play.loop._encoder.begin(lambda: None).result(30)  # in the same thread, after it

    monkeypatch.setattr(files, "encode", late)
    play = Played(configs, on)
    for id in ("first", "second"):
        play.submit("pag", id)
    play.loop.post(Stop())
    play.run()
    before = play.sent[: play.at("first", Done)]
    steps = [report.event for report in before if isinstance(report, Answer) and report.id == "second"]
    assert steps == [Step(1, STEPS), Step(2, STEPS)]


def test_a_request_that_does_not_switch_draws_what_it_draws_undisturbed(configs: dict[str, ModelConfig]) -> None:
    def quiet(play: Played, id: str, event: Any) -> None:
        pass

    def busy(play: Played, id: str, event: Any) -> None:
        if id == "it" and isinstance(event, Step):
            play.submit("sd", f"beside {event.step}", steps=2)
            play.loop.post(Cancel(f"beside {event.step - 1}"))

    pictures = []
    for on in (quiet, busy):
        play = Played(configs, on)
        play.submit("pag", "it", scheduler="euler_a")
        play.loop.post(Stop())
        play.run()
        (done,) = (event for event in play.events("it") if isinstance(event, Done))
        pictures.append(done.file)
    assert pictures[0] == pictures[1]


# The same for whatever keeps a request from switching, on pipelines in the batcher.


def rewired(pipe: Any) -> Any:
    made = view(pipe)
    made.unet.set_attn_processor(pipe.unet.attn_processors)
    return made(prompt="a cat", num_inference_steps=STEPS, output_type="np")


def cast(pipe: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return view(pipe)(prompt="a cat", num_inference_steps=STEPS, output_type="np")


def plainly(pipe: Any) -> Any:
    return view(pipe)(prompt="a cat", num_inference_steps=STEPS, output_type="np")


def film(pipe: Any) -> Any:
    return view(pipe)(prompt="a cat", num_inference_steps=STEPS, num_frames=2, height=32, width=32, output_type="np")


WAYS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "perturbed attention": (guided, plainly),
    "FreeInit": (animate_diff_free_init, film),
    "a changed module": (tiny.stable_diffusion, rewired),
    "autocast": (tiny.stable_diffusion, cast),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_not_switching_hears_a_cancel(way: str) -> None:
    build, draw = WAYS[way]
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    calls: list[int] = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    batcher = Batcher()
    task = batcher.submit(lambda: draw(pipe))
    batcher.on_listen = lambda: batcher.cancel(task, Ended()) if len(calls) == 3 else None
    before = torch_state.ambient()
    with torch.no_grad():
        while batcher.step():
            pass
    hook.remove()
    assert task.outcome is not None
    assert isinstance(task.outcome.error, Ended)
    assert len(calls) == 3
    assert torch_state.ambient() == before


@pytest.mark.parametrize("way", WAYS)
def test_a_parked_neighbour_is_ended_where_nothing_is_changed(way: str) -> None:
    """Its `finally` must not run in the middle of the other one: it would find that one's torch and modules."""
    build, draw = WAYS[way]
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    processors = dict(pipe.unet.attn_processors)
    seen: list[Any] = []
    batcher = Batcher()

    def neighbour() -> None:
        encoder = View("").stand_in(pipe.text_encoder, "text_encoder")
        try:
            for token in range(99):
                encoder(torch.tensor([[token]]))
        finally:
            seen.append((torch_state.ambient(), dict(pipe.unet.attn_processors)))

    parked = batcher.submit(neighbour)
    with torch.no_grad():
        before = torch_state.ambient()
        batcher.step()
        running = batcher.submit(lambda: draw(pipe))
        batcher.on_listen = lambda: batcher.cancel(parked, Ended())
        batcher.step()
        while batcher.step():
            pass
    assert isinstance(parked.outcome and parked.outcome.error, Ended)
    assert running.outcome is not None
    assert running.outcome.error is None
    ((ambient, found),) = seen
    assert ambient == before
    assert found == processors
