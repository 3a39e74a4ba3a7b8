"""Whatever comes, goes and fails in whatever order: each request ends once, with its own numbers."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.batching.batcher import Batcher, Task
from sfumato.batching.verification import Verification
from sfumato.batching.views import View

POISON = 666.0


class Cancelled(BaseException):
    pass


class Module(torch.nn.Module):
    """Row-wise arithmetic that notes how many rows it gets, refuses poison and has little memory."""

    def __init__(self, memory: int = 99) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5), requires_grad=False)
        self.memory = memory
        self.seen: list[int] = []

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float, scale: float = 1.0) -> torch.Tensor:
        self.seen.append(len(sample))
        if len(sample) > self.memory:
            raise torch.OutOfMemoryError("no more")
        if (sample == POISON).any():
            raise ValueError("poison")
        time = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1)
        return sample * self.weight + torch.sin(sample) * scale + time


def draw(module: Any, plan: dict[str, Any]) -> torch.Tensor:
    """What a pipeline does: start from noise, call the module step by step."""
    value = torch.randn(plan["rows"], plan["width"], generator=torch.Generator().manual_seed(plan["seed"]))
    for step in range(plan["steps"]):
        if step == plan["poison"]:
            value[0, 0] = POISON
        value = module(value, float(step), scale=plan["scale"])
    return value


plans = st.fixed_dictionaries({
    "rows": st.integers(1, 4), "width": st.sampled_from([2, 3]), "seed": st.integers(0, 99),
    "steps": st.integers(0, 6), "scale": st.sampled_from([0.5, 1.0]), "poison": st.sampled_from([-1, -1, -1, 0, 2]),
    "caller": st.sampled_from(["x", "y"]),
})  # fmt: skip

actions = st.lists(
    st.one_of(
        plans.map(lambda plan: ("submit", plan)),
        st.just(("step", None)),
        st.integers(0, 20).map(lambda which: ("cancel", which)),
    ),
    max_size=40,
)


def run(
    batcher: Batcher, module: Module, script: list[tuple[str, Any]]
) -> tuple[list[Task], list[dict[str, Any]], set[int]]:
    unet = View("").stand_in(module, "unet")
    tasks: list[Task] = []
    plans: list[dict[str, Any]] = []
    cancelled: set[int] = set()
    with torch.no_grad():
        for action, what in script:
            if action == "submit":
                plans.append(what)
                tasks.append(batcher.submit(lambda plan=what: draw(unet, plan), caller=what["caller"]))
            elif action == "step":
                batcher.step()
            elif what < len(tasks) and not tasks[what].done:
                batcher.cancel(tasks[what], Cancelled())
                cancelled.add(what)
        turns = 0
        while batcher.step():
            turns += 1
            assert turns <= 40 * 8, "the batcher does not come to an end"
    return tasks, plans, cancelled


def check(tasks: list[Task], plans: list[dict[str, Any]], cancelled: set[int]) -> None:
    for number, (task, plan) in enumerate(zip(tasks, plans, strict=True)):
        assert task.outcome is not None
        if number in cancelled:
            assert isinstance(task.outcome.error, Cancelled)
        elif 0 <= plan["poison"] < plan["steps"]:
            assert isinstance(task.outcome.error, ValueError)
        else:
            assert task.outcome.error is None
            torch.testing.assert_close(task.outcome.value, draw(Module(), plan), rtol=1e-5, atol=1e-5)


@given(actions, st.integers(1, 9), st.integers(1, 6), st.sampled_from(["unlisted", "always"]))
@settings(max_examples=150, deadline=None)
def test_each_ends_once_with_its_own_numbers(script: Any, cap: int, active: int, verify: Any) -> None:
    module = Module()
    batcher = Batcher(max_rows=cap, max_active=active, verification=Verification(verify, frozenset()))
    tasks, plans, cancelled = run(batcher, module, script)
    check(tasks, plans, cancelled)
    largest = max((plan["rows"] for plan in plans), default=0)
    assert max(module.seen, default=0) <= max(cap, largest)
    assert not batcher._active
    assert not any(batcher._queues)


@given(actions, st.integers(4, 6))
@settings(max_examples=100, deadline=None)
def test_out_of_memory_makes_batches_smaller_and_fails_nobody(script: Any, memory: int) -> None:
    module = Module(memory)
    batcher = Batcher(max_rows=16, verification=Verification("unlisted", frozenset()))
    tasks, plans, cancelled = run(batcher, module, script)
    check(tasks, plans, cancelled)
    too_large = [rows for rows in module.seen if rows > memory]
    # 16, 8, 4: for each of the two widths and two scales a batch is too large at most twice.
    assert len(too_large) <= 2 * 2 * 2


@given(st.lists(plans, min_size=2, max_size=10))
@settings(max_examples=50, deadline=None)
def test_the_same_requests_give_the_same_numbers_again(everyone: list[dict[str, Any]]) -> None:
    script = [("submit", plan) for plan in everyone]
    first, *_ = run(Batcher(verification=Verification("unlisted", frozenset())), Module(), script)
    second, *_ = run(Batcher(verification=Verification("unlisted", frozenset())), Module(), script)
    for one, two in zip(first, second, strict=True):
        assert one.outcome is not None
        assert two.outcome is not None
        assert type(one.outcome.error) is type(two.outcome.error)
        if one.outcome.error is None:
            assert torch.equal(one.outcome.value, two.outcome.value)
