"""A LoRA is read in a thread of its own: who draws meanwhile goes on, and finds torch and the model as they were."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.batching import views
from sfumato.batching.batcher import Batcher, Task
from sfumato.batching.verification import Verification
from sfumato.core import Done, Failed
from sfumato.engine.protocol import Answer
from sfumato.errors import InvalidRequest, ModelTooLarge
from sfumato.loras import Lora
from sfumato.models import lora_reading
from sfumato.models.adapters import Adapters
from support import engines, loras, tiny

CALL: dict[str, Any] = {"num_inference_steps": 4, "width": 32, "height": 32, "output_type": "np"}

LONG_S = 120.0
"""Longer than any load takes here: a hold that ends by it was never let go."""


class Held:
    """Reading stops at its beginning until `go` is set."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Semaphore(0), threading.Event()
        self.count = 0
        self.let_go: list[bool] = []
        read = lora_reading.read

        def held(*given: Any) -> Any:
            self.count += 1
            self.begun.release()
            self.let_go.append(self.go.wait(LONG_S))
            return read(*given)

        patch.setattr(lora_reading, "read", held)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(monkeypatch)
    yield held
    held.go.set()


@pytest.fixture(scope="module")
def sd() -> Any:
    pipeline = tiny.stable_diffusion()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def files(sd: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loras")
    parts = {"text_encoder": "lora_te"}
    return [loras.saved(loras.kohya(sd, parts, seed=at), folder / f"l{at}.safetensors") for at in range(3)]


def test_others_draw_all_their_steps_while_a_lora_is_read(
    files: list[Path], tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the engine's own loop: the neighbour ends before the file that is held is read."""
    tiny.save(tiny.stable_diffusion(), tmp_path / "base")
    engine = engines.Engine(tmp_path)
    steps: list[bool] = []
    keep = engine.sent.append

    def send(report: Any) -> None:
        keep(report)
        if isinstance(report, Answer) and report.id == "plain":
            steps.append(held.go.is_set())
            if isinstance(report.event, Done | Failed):
                held.go.set()

    engine.loop._send = send
    events = engine.draw(
        engines.generation("styled", loras=(loras.of(files[0]),)), engines.generation("plain", steps=6)
    )
    assert held.let_go == [True], "the neighbour waited for the file"
    assert len(steps) >= 7 and not any(steps)
    assert (engines.pixels(events["styled"]) != engines.pixels(events["plain"])).any()
    alone = engine.draw(engines.generation("styled", loras=(loras.of(files[0]),)))
    assert np.abs(engines.pixels(alone["styled"]) - engines.pixels(events["styled"])).max() <= 1
    assert held.count == 1, "it stays in memory"
    assert not engine.loop._pool.reading_loras


class Together:
    """Requests of one batcher."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline, self.adapters = pipeline, Adapters()
        self.batcher = Batcher(max_rows=8, verification=Verification())
        self.adapters.turn = lambda: self.batcher.turn(placed=True)
        self.steps: list[int] = []

    def request(self, *chosen: Lora) -> Task:
        number = len(self.steps)
        self.steps.append(0)

        def step(pipeline: Any, at: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self.steps[number] += 1
            return tensors

        def draw() -> Any:
            with self.adapters.use(self.pipeline, "cpu", "m", chosen) as selections:
                view = views.view(self.pipeline, adapters=selections)
                try:
                    noise = torch.Generator().manual_seed(1)
                    return view("a cat", **CALL, generator=noise, callback_on_step_end=step).images[0]
                finally:
                    views.close(view)

        return self.batcher.submit(draw)

    def until(self, *ended: Task) -> None:
        with torch.no_grad():
            while not all(task.done for task in ended):
                self.batcher.step()


def drawn(task: Task) -> Any:
    assert task.outcome is not None
    if task.outcome.error:
        raise task.outcome.error
    return task.outcome.value


def test_several_that_wait_for_one_read_it_once(sd: Any, files: list[Path], held: Held) -> None:
    both = Together(sd)
    tasks = [both.request(loras.of(files[0])) for _ in range(3)]
    plain = both.request()
    both.until(plain)
    assert both.steps[:3] == [0, 0, 0] and both.steps[3] >= 4
    held.go.set()
    both.until(*tasks)
    assert held.count == 1 and len(both.adapters) == 1
    one, *others = [drawn(task) for task in tasks]
    assert all(np.abs(one - other).max() < 1e-5 for other in others)
    assert np.abs(one - drawn(plain)).max() > 1e-3


class Cancelled(BaseException):
    pass


def test_who_is_cancelled_while_it_waits_leaves_nothing(sd: Any, files: list[Path], held: Held) -> None:
    both = Together(sd)
    before = drawn(ended(both, both.request()))
    first, second, kept = both.request(loras.of(files[0])), both.request(loras.of(files[1])), both.request()
    both.until(kept)
    both.batcher.cancel(first, Cancelled())
    assert not len(both.adapters) and not both.adapters.modules and both.adapters.reading, "the other still waits"
    both.batcher.cancel(second, Cancelled())
    assert not both.adapters.reading and not both.adapters._readings
    held.go.set()
    again = both.request(loras.of(files[0]))
    both.until(again)
    assert held.count == 3, "what nobody waited for was dropped"
    assert len(both.adapters) == 1
    assert np.array_equal(drawn(ended(both, both.request())), before)
    both.adapters.drop()
    assert not both.adapters.modules and not both.adapters._untouched


def test_what_was_cancelled_before_its_turn_is_not_read(sd: Any, files: list[Path], held: Held) -> None:
    both = Together(sd)
    both.adapters.alone = lock = threading.Lock()
    held.go.set()
    with lock:  # another one is being read
        first, plain = both.request(loras.of(files[0])), both.request()
        both.until(plain)
        both.batcher.cancel(first, Cancelled())
        again, plain = both.request(loras.of(files[0])), both.request()
        both.until(plain)
        assert not both.adapters._readings, "no second thread for the same file"
    both.until(again)
    drawn(again)
    assert held.count == 1


def test_the_next_one_is_read_when_a_cancelled_one_is_out_of_memory(sd: Any, files: list[Path], held: Held) -> None:
    both = Together(sd)
    first, plain = both.request(loras.of(files[0])), both.request()
    both.until(plain)
    assert held.begun.acquire(timeout=LONG_S)
    (reading,) = both.adapters._readings.values()
    both.batcher.cancel(first, Cancelled())
    second, plain = both.request(loras.of(files[1])), both.request()
    both.until(plain)
    assert both.adapters.reading, "the loop waits for its thread"
    assert not both.adapters._readings
    held.go.set()
    both.until(second)
    drawn(second)
    assert reading.done
    assert reading.result is None


def ended(both: Together, task: Task) -> Task:
    both.until(task)
    return task


def test_what_is_wrong_with_it_is_told_to_all_who_wait(sd: Any, held: Held, tmp_path: Path) -> None:
    path = loras.saved({"transformer.x.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "other.safetensors")
    both = Together(sd)
    tasks = [both.request(loras.of(path)) for _ in range(2)]
    plain = both.request()
    both.until(plain)
    held.go.set()
    both.until(*tasks)
    for task in tasks:
        with pytest.raises(InvalidRequest, match=r"other does not fit m: .*transformer\.x"):
            drawn(task)
    assert held.count == 1 and not both.adapters.modules and not both.adapters._untouched
    drawn(plain)


def test_what_is_being_read_counts_against_the_budget(sd: Any, files: list[Path], held: Held) -> None:
    both = Together(sd)
    size = files[0].stat().st_size
    both.adapters.make_room = lambda needed: needed < 1.5 * size
    first = both.request(loras.of(files[0]))
    plain = both.request()
    both.until(plain)
    second = both.request(loras.of(files[1]))
    both.until(second)
    with pytest.raises(ModelTooLarge, match="memory_mb"):
        drawn(second)
    held.go.set()
    both.until(first)
    drawn(first)


def test_modules_that_are_replaced_while_it_is_read_get_it_all_the_same(files: list[Path], held: Held) -> None:
    """As when memory runs out for another request."""
    served, expected = tiny.stable_diffusion(), tiny.stable_diffusion()
    for pipeline in (served, expected):
        pipeline.set_progress_bar_config(disable=True)
    both = Together(served)
    styled, plain = both.request(loras.of(files[0]), loras.of(files[1])), both.request()
    both.until(plain)
    served.register_modules(unet=tiny.stable_diffusion().unet)
    held.go.set()
    both.until(styled)
    other = Together(expected)
    same = drawn(ended(other, other.request(loras.of(files[0]), loras.of(files[1]))))
    assert np.abs(drawn(styled) - same).max() < 1e-5


@contextmanager
def watched(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What changes of torch for all threads."""
    changed: list[str] = []
    original = torch.nn.Module.register_parameter
    load = torch.nn.Module.load_state_dict

    def loading(*given: Any, **more: Any) -> Any:
        if torch.nn.Module.register_parameter is not original:
            changed.append("register_parameter")
        return load(*given, **more)

    patch.setattr(torch, "set_default_dtype", lambda dtype: changed.append(str(dtype)))
    patch.setattr(torch.nn.Module, "load_state_dict", loading)
    build = torch.nn.Linear.__init__

    def building(*given: Any, **more: Any) -> None:
        if torch.nn.Module.register_parameter is not original:
            changed.append("register_parameter")
        build(*given, **more)

    patch.setattr(torch.nn.Linear, "__init__", building)
    yield changed


MAKERS: list[Callable[[], Any]] = [tiny.stable_diffusion, tiny.stable_diffusion_xl, tiny.flux]


@pytest.mark.parametrize("make", MAKERS)
def test_torch_stays_as_it_is_for_all_threads(
    make: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its random numbers are those of the request that draws meanwhile; its modules would be made without weights."""
    pipeline = make()
    if hasattr(pipeline, "unet"):
        parts = {name: f"lora_te{at}" for at, name in enumerate(("text_encoder", "text_encoder_2"), 1)}
        parts = {name: prefix for name, prefix in parts.items() if hasattr(pipeline, name)}
        path = loras.saved(loras.kohya(pipeline, parts), tmp_path / "x.safetensors")
    else:
        path = loras.diffusers(make(), tmp_path, "x.safetensors")
    before = torch.random.get_rng_state()
    with watched(monkeypatch) as changed, Adapters().use(pipeline, "cpu", "m", [loras.of(path)]) as selections:
        assert any(selection.names for selection in selections.values())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert changed == []
