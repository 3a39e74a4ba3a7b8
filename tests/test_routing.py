"""Which device draws the next picture, by numbers alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.process.routing import FIRST_STEP_S, START_S, Router

STEPS = 20


class Clock:
    """A router whose pictures, steps and loads happen at times that a test says."""

    def __init__(self, devices: int, **more: Any) -> None:
        self.now = 0.0
        self.router = Router(devices, **more)
        self.numbers = 0

    def load(self, device: int, model: str, seconds: float) -> None:
        self.router.loading(device, model, self.now)
        self.now += seconds
        self.router.loaded(device, model, self.now)

    def choose(self, model: str, steps: int = STEPS, **more: Any) -> int:
        return self.router.choose(model, steps, self.now, **more)

    def send(self, model: str, steps: int = STEPS) -> int:
        """As `choose`, and the picture is sent there. Its id is the next number."""
        device = self.choose(model, steps)
        self.router.begin(str(self.numbers), device, model, steps, self.now)
        self.numbers += 1
        return device

    def draw(self, device: int, model: str, seconds: float, steps: int = STEPS, **more: Any) -> None:
        """A picture, alone on this device, with so many seconds for each step."""
        self.router.begin("drawn", device, model, steps, self.now, **more)
        for left in range(steps - 1, -1, -1):
            self.now += seconds
            self.router.step("drawn", left, self.now)
        self.router.end("drawn")


def two_with(*models: str, load_s: float = 5.0, step_s: float = 0.1) -> Clock:
    """Two devices; each of `models` is loaded on one of them, and measured."""
    clock = Clock(2)
    for device, model in enumerate(models):
        clock.load(device, model, load_s)
        clock.draw(device, model, step_s)
    return clock


def test_a_picture_goes_to_where_its_model_is() -> None:
    clock = two_with("a", "b")
    assert [clock.choose("b"), clock.choose("a"), clock.choose("b")] == [1, 0, 1]


def test_of_equals_the_first_and_of_empty_ones_the_emptiest() -> None:
    clock = Clock(3)
    assert clock.choose("a") == 0
    clock.load(0, "a", 1)
    assert clock.choose("b") == 1


def test_a_burst_spreads_once_loading_is_quicker_than_waiting() -> None:
    """A picture takes 2 s and a load 5 s: two fit before the load, the third would be done after it."""
    clock = two_with("a")
    assert [clock.send("a") for _ in range(3)] == [0, 0, 0]
    assert clock.send("a") == 1
    assert clock.choose("a") == 0  # while that load lasts, the first device is quicker again


def test_a_burst_does_not_spread_to_a_load_that_takes_longer() -> None:
    clock = two_with("a", load_s=1000)
    assert {clock.send("a") for _ in range(100)} == {0}


def test_when_both_have_it_they_share_the_work() -> None:
    clock = two_with("a", "a")
    assert [clock.send("a") for _ in range(6)] == [0, 1, 0, 1, 0, 1]


def test_long_and_short_pictures_are_told_apart() -> None:
    clock = two_with("a", "a")
    assert clock.send("a", 100) == 0
    assert [clock.send("a", 10) for _ in range(3)] == [1, 1, 1]


def test_steps_that_are_done_count_no_more() -> None:
    clock = two_with("a", "a")
    assert [clock.send("a"), clock.send("a")] == [0, 1]
    for left in range(STEPS - 1, STEPS // 2, -1):
        clock.now += 0.1
        clock.router.step("1", left, clock.now)
    assert clock.choose("a") == 1
    clock.router.end("0")
    assert clock.choose("a") == 0
    assert clock.router.wait_s(0) == 0


def test_a_quicker_device_gets_more() -> None:
    clock = Clock(2)
    for device, step_s in enumerate((0.3, 0.1)):
        clock.load(device, "a", 5)
        clock.draw(device, "a", step_s)
    assert [clock.send("a") for _ in range(4)].count(1) == 3


def test_a_full_device_is_left_to_its_models() -> None:
    """Another model would have to leave it, and to come back."""
    clock = Clock(2, loaded_models=2)
    for model in ("a", "b"):
        clock.load(0, model, 5)
    clock.load(1, "c", 5)
    clock.load(1, "a", 5)
    clock.router.unloaded(1, "a")
    assert clock.choose("d") == 1


def test_the_time_of_a_step_is_that_of_the_device() -> None:
    """Four pictures that share each forward pass make four steps in its time."""
    clock = two_with("a", step_s=1.0)
    for number in range(4):
        clock.router.begin(f"shared-{number}", 0, "a", 400, clock.now)
    for left in range(399, 0, -1):
        clock.now += 1.0
        for number in range(4):
            clock.router.step(f"shared-{number}", left, clock.now)
    assert clock.router.wait_s(0) == pytest.approx(4 * 1 * 0.25, rel=0.1)


def test_a_step_of_a_larger_picture_counts_as_more() -> None:
    """Before it was measured: what was measured of small pictures says something of large ones."""
    clock = Clock(1)
    clock.draw(0, "a", 0.1, pixels=256 * 256)
    clock.router.begin("large", 0, "a", 10, clock.now, pixels=1024 * 1024)
    assert clock.router.wait_s(0) == pytest.approx(16 * 10 * 0.1)
    clock.router.end("large")
    clock.draw(0, "a", 0.3, pixels=1024 * 1024)  # far less than that
    clock.router.begin("large", 0, "a", 10, clock.now, pixels=1024 * 1024)
    clock.router.begin("small", 0, "a", 10, clock.now, pixels=256 * 256)
    assert clock.router.wait_s(0) == pytest.approx(10 * (0.1 + 0.3))


def test_sizes_that_devices_drew_do_not_make_them_slow() -> None:
    """One drew icons, the other posters, of which a pixel takes less time than of icons or more."""
    for poster_s in (1.0, 5.0):
        clock = two_with("a", "a", step_s=0.1)
        clock.draw(0, "a", 0.1, pixels=64 * 64)
        clock.draw(1, "a", poster_s, pixels=2048 * 2048)
        assert [clock.send("a") for _ in range(4)] == [0, 1, 0, 1]


def test_a_picture_that_begins_again_measures_nothing() -> None:
    clock = two_with("a", step_s=0.1)
    clock.router.begin("again", 0, "a", 10, clock.now)
    for left in (9, 8, 9):
        clock.now += 0.1 if left < 9 else 1000
        clock.router.step("again", left, clock.now)
    assert clock.router.wait_s(0) == pytest.approx(0.9)


def test_pictures_of_low_priority_are_no_wait_for_others() -> None:
    """They are overtaken; so an idle device that would have to load the model is no better."""
    clock = two_with("a")
    clock.router.begin("batch", 0, "a", 1000, clock.now, low=True)
    assert clock.choose("a") == 0
    assert clock.choose("a", low=True) == 1
    clock.router.end("batch")
    clock.router.begin("interactive", 0, "a", 1000, clock.now)
    assert clock.choose("a") == clock.choose("a", low=True) == 1


def test_one_odd_time_does_not_distort_the_others() -> None:
    """The first step that is measured takes no time, as when two pictures answer together."""
    clock = Clock(2)
    clock.draw(0, "a", 1e-6, steps=2)
    clock.draw(0, "a", 0.1)
    clock.router.begin("there", 1, "a", 10, clock.now)
    assert clock.router.wait_s(1) == pytest.approx(1.0, rel=0.1)


def test_a_load_and_an_idle_time_are_not_measured_as_steps() -> None:
    clock = two_with("a", step_s=0.1)
    clock.now += 1000
    clock.draw(0, "a", 0.1)
    clock.router.begin("one", 0, "a", 10, clock.now)
    assert clock.router.wait_s(0) == pytest.approx(1.0)


def test_a_device_that_cannot_draw_gets_nothing_and_one_that_starts_counts_its_start() -> None:
    clock = two_with("a", "a")
    clock.router.delay(0, math.inf)
    assert clock.send("a") == 1
    clock.router.delay(0, START_S)
    assert clock.send("a") == 1
    assert clock.router.wait_s(0) == START_S
    clock.router.delay(0, 0)
    assert clock.send("a") == 0


def test_a_refused_device_is_not_chosen() -> None:
    clock = two_with("a")
    assert clock.choose("a", refused=[0]) == 1


def test_before_anything_is_measured_there_is_a_guess() -> None:
    clock = Clock(1)
    clock.send("a", 10)
    assert clock.router.wait_s(0) == pytest.approx(10 * FIRST_STEP_S)


models = st.sampled_from("abc")
events = st.lists(
    st.one_of(
        st.tuples(st.just("send"), models, st.integers(1, 50)),
        st.tuples(st.just("step"), st.integers(0, 30), st.floats(0, 2)),
        st.tuples(st.just("end"), st.integers(0, 30)),
        st.tuples(st.just("loaded"), st.integers(0, 2), models),
        st.tuples(st.just("unloaded"), st.integers(0, 2), models),
        st.tuples(st.just("delay"), st.integers(0, 2), st.sampled_from([0.0, START_S, math.inf])),
    ),
    max_size=60,
)


@given(events)
@settings(max_examples=200, deadline=None)
def test_whatever_happens_the_sums_are_right_and_nothing_stays(happening: list[tuple[Any, ...]]) -> None:
    clock = Clock(3)
    router, open = clock.router, dict[str, list[Any]]()
    for name, *more in happening:
        clock.now += 0.5
        ids = list(open)
        if name == "send":
            model, steps = more
            device = clock.send(model, steps)
            open[str(clock.numbers - 1)] = [device, model, steps]
        elif name == "step" and ids:
            each = open[id := ids[more[0] % len(ids)]]
            clock.now += more[1]
            each[2] = max(0, each[2] - 1)
            router.step(id, each[2], clock.now)
        elif name == "end" and ids:
            id = ids[more[0] % len(ids)]
            del open[id]
            router.end(id)
        elif name == "loaded":
            router.loaded(more[0], more[1], clock.now)
        elif name in ("unloaded", "delay"):
            getattr(router, name)(*more)
        for device in range(3):
            left: dict[str, float] = {}
            for on, model, steps in open.values():
                if on == device:
                    left[model] = left.get(model, 0) + steps
            assert {kind.model: steps for kind, steps in router._left[device][False].items() if steps} == {
                name: steps for name, steps in left.items() if steps
            }
            assert router.wait_s(device) >= 0
    for id in open:
        router.end(id)
    for device in range(3):
        router.delay(device, 0)
        assert router.wait_s(device) == 0
    assert not router._pictures
