"""What is learned from the times of forward passes: how many rows pay, and how many a short request bears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sfumato.batching import forward_times, policy
from sfumato.batching.batcher import Batcher
from sfumato.batching.forward_times import ANEW, ENOUGH, SHARE, ForwardTimes
from sfumato.batching.policy import Waiting
from sfumato.batching.verification import Verification
from support.batches import NOTHING, Coupled, called, noise, together

SHAPE = "unet at 64"


def learned(seconds: Mapping[int, float], *, times: int = ENOUGH, on_host: bool = True) -> ForwardTimes:
    known = ForwardTimes()
    for rows, each in seconds.items():
        for _ in range(times):
            known.note(SHAPE, rows, each, on_host=on_host)
    return known


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [
        ({2: 1.0, 4: 1.6, 8: 2.8}, 8),  # more rows pay
        ({2: 1.0, 4: 1.6, 8: 3.2}, 4),  # up to four
        ({2: 1.0, 4: 2.0, 8: 4.0}, 2),  # not at all
        ({2: 1.0, 8: 3.95}, 2),
        ({1: 1.0, 2: 1.5, 4: 3.3}, 2),  # and four are worse
        ({2: 1.0}, 8),  # nothing to compare with
        ({8: 4.0}, 8),
        ({2: 0.05, 8: 0.2}, 8),  # too short to be sure, on a host
    ],
)
def test_rows_that_do_not_pay_are_not_joined(seconds: dict[int, float], limit: int) -> None:
    assert learned(seconds).limit(SHAPE, 8) == limit


def test_an_accelerator_is_not_disturbed_and_so_believed_sooner() -> None:
    assert learned({2: 0.005, 8: 0.02}, on_host=False).limit(SHAPE, 8) == 2


def test_what_is_not_known_well_limits_nothing() -> None:
    assert learned({2: 1.0, 8: 4.0}, times=ENOUGH - 1).limit(SHAPE, 8) == 8
    assert ForwardTimes().limit(SHAPE, 8) == 8
    assert learned({2: 1.0, 8: 4.0}).limit("another", 8) == 8


def test_what_takes_no_time_is_not_noted() -> None:
    times = ForwardTimes()
    for rows in (1, 2):
        for _ in range(ENOUGH):
            times.note(SHAPE, rows, 0.0, on_host=False)
    assert times.limit(SHAPE, 4) == 4


def test_a_disturbed_forward_pass_teaches_nothing() -> None:
    known = learned({2: 1.0, 8: 3.0})
    for _ in range(ENOUGH - 1):
        known.note(SHAPE, 8, 30.0)
    assert known.limit(SHAPE, 8) == 8


def test_it_is_tried_anew_after_a_while_and_unlearned() -> None:
    """The machine was busy when the eight rows were measured."""
    known = learned({2: 1.0, 8: 4.0})
    limits = []
    for _ in range(6 * ANEW):
        rows = known.limit(SHAPE, 8)
        known.note(SHAPE, rows, {2: 1.0, 8: 3.0}[rows])
        limits.append(rows)
    assert limits[0] == 2
    assert limits[-1] == 8


def test_a_short_request_takes_along_what_it_can_bear() -> None:
    known = learned({2: 1.0, 4: 1.2, 6: 1.8, 8: 2.4}, times=100)
    assert known.bearable(SHAPE, 2, 8) == 4
    assert known.bearable(SHAPE, 2, 5) == 4
    flat = learned({2: 1.0, 8: 1.1}, times=100)
    assert flat.bearable(SHAPE, 2, 8) == 8  # rows are free, as on a large GPU


def test_no_more_is_lost_for_short_requests_than_their_share() -> None:
    known = learned({2: 1.0, 8: 2.6}, times=1)
    lost = spent = 0.0
    for _ in range(1000):
        rows = known.bearable(SHAPE, 2, 8)
        known.lose(SHAPE, rows, 8)
        seconds = {2: 1.0, 8: 2.6}[rows]
        known.note(SHAPE, rows, seconds)
        spent += seconds
        lost += seconds - 2.6 * rows / 8
    assert 0.9 * SHARE < lost / spent < 1.01 * SHARE


def test_low_rows_ride_along_as_far_as_a_forward_pass_bears_them_however_short_it_is() -> None:
    """Their work is no reason to make interactive requests slower: there is no account of what is lost."""
    quick = {rows: seconds / 64 for rows, seconds in CPU.items()}
    known = learned(quick)
    assert [known.rides(SHAPE, 2, most) for most in (2, 4, 8)] == [2, 3, 3]
    assert known.rides(SHAPE, 4, 8) == 5, "1.25 times as long, by what lies between 4 and 6 rows"
    assert learned({2: 1.0, 8: 1.1}).rides(SHAPE, 2, 8) == 8
    assert ForwardTimes().rides(SHAPE, 2, 8) == 2, "how long it takes alone is measured first"
    assert learned({2: 1.0}).rides(SHAPE, 2, 8) == 8, "and then it is tried"


# The whole: six requests of 50 steps are under way, and one of four steps comes.

CPU = {2: 1.0, 4: 1.5, 6: 2.0, 8: 2.5}
"""Time of a forward pass, by rows: assumed, as of a CPU that gains from batching."""


def simulated(short_at: float, *, bearing: bool) -> tuple[float, float]:
    """How long the short request takes over alone, and when all have ended."""
    known = learned(CPU)
    now, moved, arrived, ended = 0.0, 0, 0.0, 0.0
    left, steps, since = dict.fromkeys(range(6), 50), dict.fromkeys(range(6), 50), dict.fromkeys(range(6), 0)
    while left:
        if now >= short_at and 9 not in steps:
            left[9], steps[9], since[9], arrived = 4, 4, moved, now
        waiting = [Waiting(n, "unet", 2, since[n], "", left[n], frozenset({"unet"}), steps[n]) for n in left]

        def bearable(leader: Waiting, most: int) -> int:
            rows = known.bearable(SHAPE, leader.rows, most)
            known.lose(SHAPE, rows, most)
            return rows

        group = policy.choose(waiting, moved, lambda _: 8, **({"bearable": bearable} if bearing else {}))
        seconds = CPU[sum(call.rows for call in group)]
        known.note(SHAPE, sum(call.rows for call in group), seconds)
        now, moved = now + seconds, moved + 1
        for call in group:
            since[call.id] = moved
            left[call.id] -= 1
            if not left[call.id]:
                del left[call.id]
                ended = now if call.id == 9 else ended
    return (ended - arrived) / (4 * CPU[2]), now


def test_a_short_request_behind_long_ones_is_hardly_slower_than_alone() -> None:
    before, all_before = simulated(40.0, bearing=False)
    after, all_after = simulated(40.0, bearing=True)
    assert before > 2
    assert after < 1.5
    assert all_after / all_before < 1.05


# What is measured.


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(torch.nn.Module):
    """Each row takes a second, and each forward pass two."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        self.clock.now += 2.0 + len(sample)
        return sample * 2


def test_the_batcher_notes_forward_passes_of_one_and_of_several() -> None:
    clock = Clock()
    module, times, verification = Slow(clock).eval(), ForwardTimes(clock), Verification("unlisted", NOTHING)
    alone = lambda stand_in: stand_in(noise(1, 3))  # noqa: E731
    with torch.no_grad():
        for count in (1, 2, 2, 4):
            together(module, [alone] * count, times=times, verification=verification)
    of = forward_times.shape(called(module, noise(1, 3)))
    noted = {rows: list(seconds) for rows, seconds in times._shapes[of].seconds.items()}
    assert noted[1][0] == 3.0
    assert noted[4] == [6.0]
    assert 4.0 in noted[2]
    assert all(each == 2.0 + rows for rows, seconds in noted.items() for each in seconds)  # no proof among them


def test_what_raises_is_not_noted() -> None:
    clock = Clock()
    times = ForwardTimes(clock)

    class Broken(torch.nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    with torch.no_grad():
        together(Broken().eval(), [lambda stand_in: stand_in(noise(1, 3))] * 2, times=times)
    assert not times._shapes


def test_unloading_a_model_forgets_its_times() -> None:
    batcher = Batcher()
    batcher.times.note(SHAPE, 2, 1.0)
    batcher.forget()
    assert not batcher.times._shapes


def test_an_accelerator_is_read_when_it_is_ready_and_never_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events stand in for a device that is some forward passes behind."""
    ready: list[bool] = []
    current: list[int | None] = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = len(ready)

        def record(self) -> None:
            assert current == [1], "the model's card is not the first one"
            ready.append(False)

        def query(self) -> bool:
            return ready[self.at]

        def elapsed_time(self, other: Any) -> float:
            assert other.query()
            return 40.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", on)
    times = ForwardTimes()
    call = called(Coupled(), noise(2, 3).to("meta"))
    monkeypatch.setattr(forward_times, "_device", lambda call: torch.device("cuda", 1))
    times.end(times.begin(call), call, 2)
    assert not times._shapes
    ready[:] = [True] * len(ready)
    times.end(times.begin(call), call, 4)
    (entry,) = times._shapes.values()
    assert {rows: list(seconds) for rows, seconds in entry.seconds.items()} == {2: [0.04]}
    assert not entry.on_host
