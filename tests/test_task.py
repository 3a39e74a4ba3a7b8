"""Where a request stands, and what a trial knows of its members."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from sfumato.batching.batcher import Batcher
from sfumato.batching.outcomes import Compute, Result
from sfumato.batching.task import NEXT, State, Task
from sfumato.batching.trial import Blame, Comparison
from sfumato.batching.verification import Verification
from sfumato.batching.views import View


class Cancelled(BaseException):
    pass


class Doubled(torch.nn.Module):
    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample * 2


def states_of(task: Task, turns: Any) -> list[State]:
    seen = [task.state]
    become = task._become

    def note(state: State) -> None:
        become(state)
        seen.append(state)

    task._become = note  # type: ignore[method-assign]
    turns()
    return seen


def run(batcher: Batcher) -> None:
    with torch.no_grad():
        while batcher.step():
            pass


def test_every_state_has_its_transitions_and_the_end_has_none() -> None:
    assert NEXT.keys() == set(State)
    assert not NEXT[State.ENDED]
    reached = {State.QUEUED}
    while more := {after for state in reached for after in NEXT[state]} - reached:
        reached |= more
    assert reached == set(State)


def test_a_request_goes_from_the_queue_to_its_end() -> None:
    module = View("").stand_in(Doubled(), "module")
    batcher = Batcher()
    task = batcher.submit(lambda: (batcher.turn(), module(torch.ones(1, 1))))
    begun = [State.QUEUED, State.READY, State.RUNNING, State.PAUSED, State.RUNNING]
    assert states_of(task, lambda: run(batcher)) == [*begun, State.PARKED, State.READY, State.RUNNING, State.ENDED]
    assert task.done


@pytest.mark.parametrize("turns", range(3))
def test_a_request_can_be_cancelled_wherever_it_stands(turns: int) -> None:
    """Queued, paused, parked: it ends, and so does nobody else."""
    module = View("").stand_in(Doubled(), "module")
    batcher = Batcher(max_active=2)
    first = batcher.submit(lambda: (batcher.turn(), module(torch.ones(1, 1)), module(torch.ones(1, 1))))
    other = batcher.submit(lambda: [module(torch.ones(1, 1)) for _ in range(3)])
    queued = batcher.submit(lambda: module(torch.ones(1, 1)))
    with torch.no_grad():
        for _ in range(turns):
            batcher.step()
    batcher.cancel(first, Cancelled())
    assert first.state is State.ENDED
    if turns < 2:
        batcher.cancel(queued, Cancelled())
        assert queued.state is State.ENDED
    run(batcher)
    assert other.outcome is not None
    assert other.outcome.error is None


def test_one_that_waits_for_others_takes_no_place_and_waits_for_one_afterwards() -> None:
    module = View("").stand_in(Doubled(), "module")
    batcher = Batcher(max_active=1)
    there, drawing, most = False, 0, 0

    def draw(calls: int) -> None:
        nonlocal drawing, most
        drawing += 1
        most = max(most, drawing)
        for _ in range(calls):
            module(torch.ones(1, 1))
        drawing -= 1

    def wait() -> None:
        while not there:
            batcher.turn()
        with batcher.placed():
            draw(2)

    waiting = [batcher.submit(wait) for _ in range(3)]
    told: list[bool] = []
    waiting[0].on_place = told.append
    others = [batcher.submit(lambda: draw(3)) for _ in range(2)]
    with torch.no_grad():
        while not others[0].done:
            batcher.step()
        there = True
        while batcher.step():
            pass
    assert all(task.done and task.outcome and task.outcome.error is None for task in (*waiting, *others))
    assert most == 1
    assert told == [False, True], "once for all its turns"


@pytest.mark.parametrize("wrong", [Result(1), Compute()])
def test_nobody_is_answered_who_has_not_asked(wrong: Any) -> None:
    batcher = Batcher()
    task = batcher.submit(batcher.turn)
    batcher.step()
    with pytest.raises(AssertionError, match="PAUSED"):
        task.answer(wrong)


def test_one_that_gives_its_turn_away_while_it_ends_goes_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody resumes it. Python closes its greenlet."""
    batcher = Batcher()
    ended: list[int] = []

    def draw() -> None:
        try:
            batcher.turn()
        finally:
            batcher.turn()
            ended.append(1)

    task = batcher.submit(draw)
    batcher.step()
    batcher.cancel(task, Cancelled())
    assert not batcher.step()
    del task
    gc.collect()
    assert ended == []
    assert capsys.readouterr().err == ""


def test_a_comparison_settles_once_all_members_are_cleared() -> None:
    settled: list[list[float]] = []
    trial = Comparison([torch.ones(1), torch.ones(1)], settled.append)
    trial.computed(1, torch.ones(1) / 2)
    assert (trial.outstanding, trial.cleared, trial.guilty, settled) == ({0}, {1}, set(), [])
    trial.computed(0, torch.ones(1))
    assert len(settled) == 1
    assert settled[0][0] == 0
    assert settled[0][1] > 0.4


@pytest.mark.parametrize("guilty", [{0}, {1}, {0, 1}, set()])
def test_joining_is_to_blame_only_where_no_member_is_guilty(guilty: set[int]) -> None:
    refused: list[int] = []
    trial = Blame(2, lambda: refused.append(1))
    for member in (1, 0):
        if member in guilty:
            trial.raised(member)
        else:
            trial.computed(member, None)
    assert (trial.outstanding, trial.guilty, trial.cleared) == (set(), guilty, {0, 1} - guilty)
    assert refused == ([] if guilty else [1])


class Picky(torch.nn.Module):
    """Refuses 500, and more rows than `most`."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        if (sample == 500).any() or len(sample) > self.most:
            raise ValueError("no")
        return sample * 2


@pytest.mark.parametrize(("most", "values", "refused"), [(9, (1.0, 500.0), False), (1, (1.0, 2.0), True)])
def test_a_kind_of_batch_is_refused_only_where_nobody_is_guilty(
    most: int, values: tuple[float, ...], refused: bool
) -> None:
    batcher = Batcher(verification=Verification("unlisted", frozenset()))
    module = View("").stand_in(Picky(most), "module")
    for value in values:
        batcher.submit(lambda value=value: module(torch.full((1, 2), value)))  # type: ignore[misc]
    run(batcher)
    assert bool(batcher.verification.refused) is refused
