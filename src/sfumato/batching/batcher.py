"""Run many requests on one thread: they park at their module calls and share forward passes.

Each request is a greenlet that runs unmodified code (a pipeline, on a `views.view`). When that code calls
a heavy module, the greenlet parks and control returns to the `Batcher`. It picks a group of compatible parked calls,
computes one forward pass for all of them, and resumes each request with its rows of the result. A call that is
compatible with no other is computed by its own greenlet, as without batching.

`Batcher.step` is one turn: admit, advance, schedule, run, scatter. This module knows nothing about pipelines or what
a request means. `policy.choose` is the policy, `runner.Runner` runs forward passes, `calls` has the batching rule,
`verification` decides which calls may be batched, and `task.State` is the state of a request.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import greenlet  # type: ignore[import-untyped]
import torch

from sfumato.batching import adapter_rows, cpu_threads, interruption, offload, policy, torch_state
from sfumato.batching.calls import Call, Fingerprints
from sfumato.batching.concatenation import ConcatenationCache
from sfumato.batching.counts import Count, Counts
from sfumato.batching.fair_share import FairShare
from sfumato.batching.forward_times import ForwardTimes, shape
from sfumato.batching.interruption import SharedCall, Slices
from sfumato.batching.outcomes import Compute, Outcome, Reply, Result, is_out_of_memory
from sfumato.batching.prompt_cache import PromptCache
from sfumato.batching.reasons import Reason
from sfumato.batching.row_limits import RowLimits
from sfumato.batching.runner import Runner
from sfumato.batching.task import State, Task
from sfumato.batching.verification import Verification

__all__ = ["Batcher", "Count", "Outcome", "Task", "is_out_of_memory"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Batcher:
    """Runs tasks on the thread that calls `step`. Call all methods on that thread."""

    max_rows: int = 8
    """Maximum rows of a forward pass. A request with guidance usually has two; a call with more rows runs alone."""
    max_active: int = 16
    """Maximum interactive requests that draw, besides `policy.low_places` of low priority. Each keeps its tensors in
    memory, also while it yields to others. Those that wait for others have none."""
    patience: int = policy.PATIENCE
    on_listen: Callable[[], None] = lambda: None
    """Called before each call of a request that runs without switching, to handle other requests in the meantime."""
    verification: Verification = field(default_factory=Verification)
    prompt_cache: PromptCache = field(default_factory=PromptCache)
    fingerprints: Fingerprints = field(default_factory=Fingerprints)
    concatenations: ConcatenationCache = field(default_factory=ConcatenationCache)
    counts: Counts = field(default_factory=Counts)
    """`verification.refused` has the signatures that a trial has refused."""
    now: int = 0
    """Number of turns so far that computed something."""
    ambient: tuple[Any, ...] = ()
    """torch state at the start of this turn; it must be the same on both sides of a switch."""
    threads: int = field(default_factory=torch.get_num_threads)
    """CPU threads for requests that do not set them."""
    slices: Slices = field(default_factory=Slices)
    times: ForwardTimes = field(default_factory=ForwardTimes)
    limits: RowLimits = field(init=False)
    _runner: Runner = field(init=False)
    _share: FairShare = field(default_factory=FairShare)
    _queues: tuple[deque[Task], deque[Task]] = field(default_factory=lambda: (deque(), deque()))
    """Requests without a place yet: interactive ones, and those of low priority."""
    _active: dict[int, Task] = field(default_factory=dict)
    _shared: list[SharedCall] = field(default_factory=list)
    """Long forward passes for several calls that have been interrupted."""
    _to_end: list[Task] = field(default_factory=list)
    """Tasks to end as soon as no request is running."""
    _low_led: int = 0
    """`now` when a call of low priority led a forward pass last."""
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.limits = RowLimits(self.max_rows, self.times)
        self._runner = Runner(self.verification, self.concatenations, self.counts)

    def submit(self, function: Callable[[], Any], *, caller: str = "", low: bool = False) -> Task:
        """Queue a request: `function` runs in a greenlet and may call views of pipelines. `low`: it yields."""
        task = Task(self, next(self._numbers), function, caller, low)
        self._queues[low].append(task)
        return task

    def step(self) -> bool:
        """Run one turn; False if no requests are left. Computes at most one module call per request."""
        self.ambient = torch_state.ambient()
        self.threads = torch.get_num_threads()
        self._admit()
        self._advance()
        while self._admit():  # some have begun to wait for others, and given up their places
            self._advance()
        long = self._interrupted()
        group = self._schedule(long)
        if group or long:
            self.now += 1
        if group:
            self._compute(group)
        if long and (not group or self.slices.may_go_on):
            self._go_on(long[0])
            self.slices.end()
        return bool(self._active or any(self._queues))

    # The parts of a turn, in order.

    def _admit(self) -> bool:
        """Give places while they are free, to interactive requests first. Returns whether any got one."""
        return any(self._admit_class(low) for low in (False, True))

    def _admit_class(self, low: bool) -> bool:
        """In order of arrival: to requests that have waited for others, then to queued ones, which start."""
        before = free = self._free_places(low)
        returning = [task for task in self._active.values() if task.returns and task.low is low]
        for task in returning[: max(0, free)]:
            task.place(True)
            free -= 1
        while self._queues[low] and free > 0:
            free -= 1
            task = self._queues[low].popleft()
            self._share.enter(task.payer, (other.payer for other in self._active.values() if other.low is low))
            self._active[task.number] = task
            task.admit()
        return free < before

    def _advance(self) -> None:
        """Resume requests that need no forward pass, also those answered by the prompt cache, until all are parked."""
        self._answer_from_cache()
        ready = self._in_state(State.READY, State.PAUSED)
        while ready:
            for task in ready:
                self._resume(task)
            self._end_marked()
            self._answer_from_cache()
            ready = self._in_state(State.READY)

    def _schedule(self, long: Sequence[Task | SharedCall]) -> list[Task]:
        """The tasks whose calls share the next forward pass, the leader first; empty if no task is parked.

        `long`: calls that have been interrupted; others that may be long begin beside them if they are much smaller.
        """
        waiting = [
            self._waiting(task)
            for task in self._in_state(State.PARKED)
            if task.call and interruption.may_begin(task.call, long)
        ]
        chosen = policy.choose(
            waiting, self.now, self._room, self._received, self.patience, self._bearable, self._rides, self._low_led
        )
        if chosen and chosen[0].low:
            self._low_led = self.now
        leaders: dict[Hashable, Task] = {}
        for waiting_call in chosen:
            task = self._active[waiting_call.id]
            self._share.add(task.payer, waiting_call.rows)
            # Equal texts are computed once; the prompt cache answers the others before the next forward pass is chosen.
            leaders.setdefault(task.prompt_key if task.prompt_key is not None else task.number, task)
        return adapter_rows.together(list(leaders.values()), _adapters)

    def _compute(self, group: Sequence[Task]) -> None:
        """One forward pass for the calls of `group`, or, of a long one, the first part."""
        calls = [call for task in group if (call := task.call)]
        began = self.slices.now()
        if calls[0].method not in interruption.METHODS:
            if replies := self._run(group, calls):
                self._scatter(group, replies)
            self.slices.forward(began)
        else:
            if len(group) == 1:
                self._scatter(group, [Compute()])
            else:
                self._begin_long(group, calls)
            self.slices.end()

    def _run(self, group: Sequence[Task], calls: Sequence[Call]) -> Sequence[Reply]:
        """One forward pass: a reply for each of `group`; empty if it ran out of memory."""
        if len(group) == 1:
            return [Compute()]
        with cpu_threads.using(group[0].threads or self.threads):
            begun = self.times.begin(calls[0])
            replies = self._runner.run(calls)
            if replies and isinstance(replies[0], Result):  # neither proved nor failed
                self.times.end(begun, calls[0], sum(call.rows for call in calls))
        if replies is None:
            self._make_room(calls)
        return replies or ()

    def _begin_long(self, group: Sequence[Task], calls: Sequence[Call]) -> None:
        def before_part(on_host: bool) -> None:
            if self.slices.over(on_host) and torch_state.ambient() == self.ambient:
                shared.interrupt()

        shared = SharedCall(group, lambda: self._runner.run(calls, before_part))
        for task in group:
            task.batch()
        self._shared.append(shared)
        self._go_on(shared)

    def _go_on(self, long: Task | SharedCall) -> None:
        """Compute the next part of a long call."""
        long.went_on = self.now
        if isinstance(long, Task):
            self._resume(long)
            return
        if all(task.done for task in long.group):
            long.end()
        else:
            self.slices.begin(others=len(self._active) > len(long.group))
            with cpu_threads.using(long.group[0].threads or self.threads):
                long.switch()
        if not long.dead:
            return
        self._shared.remove(long)
        if long.replies is not None:
            self._scatter(long.group, long.replies)
        elif parked := [task for task in long.group if not task.done]:
            for task in parked:
                task.park_again()
            self._make_room([task.call for task in parked if task.call])

    def _scatter(self, group: Sequence[Task], replies: Sequence[Reply]) -> None:
        """Send the replies. A task that must compute its own call does so at once; others resume in the next turn."""
        for task, reply in zip(group, replies, strict=True):
            if task.done:  # ended by an earlier one
                continue
            if isinstance(reply, Result) and task.prompt_key is not None and task.call is not None:
                self.prompt_cache.put(task.prompt_key, task.call.module, reply.value, reply.by)
            task.answer(reply)
            if isinstance(reply, Compute):
                self._resume(task)
        self._end_marked()

    # Used by the parts of a turn.

    def _free_places(self, low: bool) -> int:
        most = policy.low_places(self.max_active) if low else self.max_active
        return most - sum(task.placed for task in self._active.values() if task.low is low)

    def _in_state(self, *states: State) -> list[Task]:
        return [task for task in self._active.values() if task.state in states]

    def _interrupted(self) -> list[Task | SharedCall]:
        """Long calls that have been interrupted, in the order in which they go on: in turns."""
        return sorted([*self._shared, *self._in_state(State.INTERRUPTED)], key=lambda long: long.went_on)

    def _resume(self, task: Task) -> None:
        self._end_marked()
        if task.done:  # cancelled by another one in this turn
            return
        self.slices.begin(others=len(self._active) > 1)
        task.resume()
        if task.outcome is not None:
            self._active.pop(task.number, None)
            if not self._active:
                self._share.clear()
            if isinstance(task.outcome.error, KeyboardInterrupt | SystemExit):
                raise task.outcome.error
        if torch_state.ambient() != self.ambient:
            # Requests park only in the ambient state; this one has ended without restoring it.
            log.warning(
                "request %d left torch's state changed: %s, was %s", task.number, torch_state.ambient(), self.ambient
            )
            torch_state.restore(self.ambient)

    def _answer_from_cache(self) -> None:
        for task in self._active.values():
            if task.state is not State.PARKED or task.prompt_key is None or task.call is None:
                continue
            if cached := self.prompt_cache.get(task.prompt_key):
                self.counts.add(task.call.name, 1, 0)
                task.answer(Result(*cached))

    def _waiting(self, task: Task) -> policy.Waiting:
        """The task's call as the policy sees it."""
        call = task.call
        assert call is not None
        key = self.verification.key(call)
        if task.waiting is None or task.waiting.key != key:  # just parked, or a trial has changed the key
            task.past_keys[-1] = key if key is not None else (id(call.module), call.method)
            task.waiting = policy.Waiting(
                id=task.number,
                key=key,
                rows=call.rows,
                since=task.since,
                caller=task.caller,
                steps_left=task.steps_left,
                steps=task.steps,
                repeated_keys=policy.repeated_keys(list(task.past_keys)),
                low=task.low,
                deadline=task.deadline,
            )
        return task.waiting

    def _room(self, waiting: policy.Waiting) -> int:
        call = self._active[waiting.id].call
        assert call is not None
        return self.limits.of(call)

    def _received(self, waiting: policy.Waiting) -> float:
        return self._share.of(self._active[waiting.id].payer)

    def _rides(self, leader: policy.Waiting, rows: int, most: int) -> int:
        call = self._active[leader.id].call
        assert call is not None
        return self.times.rides(shape(call), rows, most)

    def _bearable(self, leader: policy.Waiting, most: int) -> int:
        call = self._active[leader.id].call
        assert call is not None
        rows = self.times.bearable(of := shape(call), leader.rows, most)
        self.times.lose(of, rows, most)
        return rows

    def _make_room(self, calls: Sequence[Call]) -> None:
        """Out of memory: drop the caches, or if they are empty halve the rows for this module and shape.

        The members stay parked, and the next turn tries them again.
        """
        freed = self.free_caches()
        offload.empty_cache()
        if freed:
            log.warning("out of memory: %d bytes of kept results are dropped for %s", freed, calls[0].name)
        else:
            log.warning("out of memory: at most %d rows for %s of this size", self.limits.halve(calls), calls[0].name)

    # Called inside a request.

    def turn(self, *, placed: bool = False) -> None:
        """Let all other requests run, then resume: for one that waits for others. `placed`: it keeps its place."""
        task = greenlet.getcurrent()
        assert isinstance(task, Task)
        task.place(task.placed and placed)
        task.pause()

    def let_long_calls_end(self) -> None:
        """Inside a request whose model's weights are to be moved: returns when no long call is interrupted."""
        while self._interrupted():
            self.turn(placed=True)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """For a request that has waited for others: it goes on inside when there is a place for it."""
        task = greenlet.getcurrent()
        assert isinstance(task, Task)
        task.place(task.placed or self._free_places(task.low) > 0)
        task.returns = not task.placed
        while task.returns:
            task.pause()
        yield

    def listen(self) -> None:
        """Handle new commands, inside a request that must not switch. Raises the error that cancels this request."""
        self.on_listen()
        task = self._inside()
        if task and task.pending_error is not None and not task._closing:
            task.cancel(task.pending_error)

    def why_alone(self, call: Call) -> Reason | None:
        """Why this call cannot be batched; None if it only had no partner."""
        if call.key is None:
            return call.reason
        if self.verification.key(call) is None:
            return self.verification.label(call)
        return Reason.ROWS if 2 * call.rows > self.limits.of(call) else None

    def computed(self, task: Task, call: Call, value: Any, by: str) -> None:
        """A request has computed its own call; `by`: the name of its runner, as in `Result`."""
        if task.prompt_key is not None:
            self.prompt_cache.put(task.prompt_key, call.module, value, by)

    def _inside(self) -> Task | None:
        """The request of this batcher that is running; None outside of requests."""
        current = greenlet.getcurrent()
        return current if isinstance(current, Task) and current.batcher is self else None

    # The end of requests.

    def cancel(self, task: Task, error: BaseException) -> None:
        """End `task` with `error`, whatever its state. Other requests are not affected.

        Called inside a request, this only marks the task. The running request itself ends at its next call of `listen`
        or of a module; others end when it has parked, because their `finally` blocks must find torch and the shared
        modules as they left them, not as the running request has set them.
        """
        if task.done:
            return
        if self._inside():
            if task.pending_error is None:
                task.pending_error = error
                self._to_end.append(task)
            return
        if task.state is State.QUEUED:
            self._queues[task.low].remove(task)
        task.cancel(error)
        self._active.pop(task.number, None)

    def close(self, error: BaseException) -> None:
        """End every task with `error`."""
        for task in [*itertools.chain(*self._queues), *self._active.values()]:
            self.cancel(task, error)
        for shared in self._shared:
            shared.end()
        self._shared.clear()

    def _end_marked(self) -> None:
        while self._to_end:
            task = self._to_end.pop()
            assert task.pending_error is not None
            self.cancel(task, task.pending_error)

    # Memory.

    def free_caches(self) -> int:
        """Memory is short: clear the caches, halve their limits, and return the bytes freed."""
        freed = self.prompt_cache.shrink() + self.concatenations.shrink()
        self.fingerprints.clear()
        return freed

    def forget(self) -> None:
        """Clear the caches: call it when a model is unloaded or its weights or adapters change."""
        self.prompt_cache.clear()
        self.concatenations.clear()
        self.limits.clear()
        self.times.clear()


def _adapters(task: Task) -> object:
    return task.call and task.call.selection and task.call.selection.names
