"""The heart: many requests on one thread, parked at their module calls, sharing forwards.

Each request is a greenlet that runs unmodified code (a pipeline, on a `views.view`). Where that code calls
a heavy module the greenlet parks and control comes back to the `Batcher`, which picks a group of parked calls
that are alike, computes one forward for all of them, and lets each go on with its rows of the result. A call
that is like no other is computed by its own greenlet, as if nothing were in between.

`Batcher.step` is one turn: admit, advance, schedule, run, scatter. Nothing here knows a pipeline or a request's
meaning; the policy is `policy.choose`, the forward `runner.Runner`, the rule `calls`, what may be joined
`verification`, where a request stands `task.State`.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import greenlet  # type: ignore[import-untyped]
import torch

from sfumato.batching import cpu_threads, offload, policy, torch_state
from sfumato.batching.calls import Call, Fingerprints
from sfumato.batching.concatenation import ConcatenationCache
from sfumato.batching.counts import Count, Counts
from sfumato.batching.fair_share import FairShare
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
    """Runs tasks on the thread that calls `step`. All methods are for that thread."""

    max_rows: int = 8
    """Rows of one forward. A request with guidance mostly has two; one that has more than this runs alone."""
    max_active: int = 16
    """Requests that have started and not ended. Each keeps its tensors in memory."""
    patience: int = policy.PATIENCE
    on_listen: Callable[[], None] = lambda: None
    """Called inside a request that computes without a switch, before each call, so that others are heard meanwhile."""
    trust: Verification = field(default_factory=Verification)
    memo: PromptCache = field(default_factory=PromptCache)
    prints: Fingerprints = field(default_factory=Fingerprints)
    joins: ConcatenationCache = field(default_factory=ConcatenationCache)
    counts: Counts = field(default_factory=Counts)
    """`trust.refused` has besides what was found out by trial."""
    now: int = 0
    """Turns so far in which something was computed."""
    ambient: tuple[Any, ...] = ()
    """What of torch's state has to be the same on both sides of a switch, as it was when this turn began."""
    threads: int = field(default_factory=torch.get_num_threads)
    """CPU threads of requests that do not say how many."""
    limits: RowLimits = field(init=False)
    _runner: Runner = field(init=False)
    _share: FairShare = field(default_factory=FairShare)
    _queue: deque[Task] = field(default_factory=deque)
    _active: dict[int, Task] = field(default_factory=dict)
    _ending: list[Task] = field(default_factory=list)
    """Those to be ended as soon as no request is running."""
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.limits = RowLimits(self.max_rows)
        self._runner = Runner(self.trust, self.joins, self.counts)

    def submit(self, function: Callable[[], Any], *, caller: str = "") -> Task:
        """Queue a request: `function` runs in a greenlet and may call pipelines on views."""
        task = Task(self, next(self._numbers), function, caller)
        self._queue.append(task)
        return task

    def step(self) -> bool:
        """One turn; False when there is nothing left to do. At most one module call per request is computed."""
        self.ambient = torch_state.ambient()
        self.threads = torch.get_num_threads()
        self._admit()
        self._advance()
        if group := self._schedule():
            self.now += 1
            if replies := self._run(group):
                self._scatter(group, replies)
        return bool(self._active or self._queue)

    # One turn, in the order in which it happens.

    def _admit(self) -> None:
        """Who waits for a place gets one that is free, in the order in which they came."""
        while self._queue and len(self._active) < self.max_active:
            task = self._queue.popleft()
            self._share.enter(task.caller, (other.caller for other in self._active.values()))
            self._active[task.number] = task
            task.admit()

    def _advance(self) -> None:
        """Whoever needs no forward goes on, also whom the prompt cache answers, until all are parked at what is new."""
        self._answer_from_cache()
        ready = self._those(State.READY, State.PAUSED)
        while ready:
            for task in ready:
                self._resume(task)
            self._end_marked()
            self._answer_from_cache()
            ready = self._those(State.READY)

    def _schedule(self) -> list[Task]:
        """Those whose calls share the next forward; the first leads. Empty when nobody is parked."""
        waiting = [self._waiting(task) for task in self._active.values() if task.state is State.PARKED]
        chosen = policy.choose(waiting, self.now, self._room, self._share.of, self.patience)
        leaders: dict[Hashable, Task] = {}
        for each in chosen:
            task = self._active[each.id]
            self._share.add(task.caller, each.rows)
            # Of equal texts one is computed; the others find it in the prompt cache before the next forward is chosen.
            leaders.setdefault(task.memo_key if task.memo_key is not None else task.number, task)
        return list(leaders.values())

    def _run(self, group: Sequence[Task]) -> Sequence[Reply]:
        """One forward for the calls of `group`; what each is told. Empty where memory was too short."""
        if len(group) == 1:
            return [Compute()]
        calls = [call for task in group if (call := task.call)]
        with cpu_threads.using(group[0].threads or self.threads):
            replies = self._runner.run(calls)
        if replies is None:
            self._make_room(calls)
        return replies or ()

    def _scatter(self, group: Sequence[Task], replies: Sequence[Reply]) -> None:
        """Each gets its answer. Who is told to compute its own call does so at once, the others go on next turn."""
        for task, reply in zip(group, replies, strict=True):
            if task.done:  # ended by one before it
                continue
            if isinstance(reply, Result) and task.memo_key is not None and task.call is not None:
                self.memo.put(task.memo_key, task.call.module, reply.value)
            task.answer(reply)
            if isinstance(reply, Compute):
                self._resume(task)
        self._end_marked()

    # What a turn is made of.

    def _those(self, *states: State) -> list[Task]:
        return [task for task in self._active.values() if task.state in states]

    def _resume(self, task: Task) -> None:
        self._end_marked()
        if task.done:  # cancelled by another one in this very turn
            return
        task.resume()
        if task.outcome is not None:
            self._active.pop(task.number, None)
            if not self._active:
                self._share.clear()
            if isinstance(task.outcome.error, KeyboardInterrupt | SystemExit):
                raise task.outcome.error
        if torch_state.ambient() != self.ambient:
            # Requests park in the ambient state only; this one has ended without putting it back.
            log.warning(
                "request %d left torch's state changed: %s, was %s", task.number, torch_state.ambient(), self.ambient
            )
            torch_state.restore(self.ambient)

    def _answer_from_cache(self) -> None:
        for task in self._active.values():
            if task.state is not State.PARKED or task.memo_key is None or task.call is None:
                continue
            if known := self.memo.get(task.memo_key):
                self.counts.add(task.call.name, 1, 0)
                task.answer(Result(known[0]))

    def _waiting(self, task: Task) -> policy.Waiting:
        """Its call as the policy sees it."""
        call = task.call
        assert call is not None
        key = self.trust.key(call)
        if task.waiting is None or task.waiting.key != key:  # just parked, or a trial has changed what is alike
            task.past[-1] = key if key is not None else (id(call.module), call.method)
            task.waiting = policy.Waiting(
                id=task.number,
                key=key,
                rows=call.rows,
                since=task.since,
                caller=task.caller,
                left=task.left,
                loop=policy.loop(list(task.past)),
            )
        return task.waiting

    def _room(self, waiting: policy.Waiting) -> int:
        call = self._active[waiting.id].call
        assert call is not None
        return self.limits.of(call)

    def _make_room(self, calls: Sequence[Call]) -> None:
        """Out of memory: without what is kept of earlier calls; else half as many rows for this module and shape.

        The members stay parked, and the next turn tries them again.
        """
        freed = self.spare()
        offload.empty_cache()
        if freed:
            log.warning("out of memory: %d bytes of kept results are dropped for %s", freed, calls[0].name)
        else:
            log.warning("out of memory: at most %d rows for %s of this size", self.limits.halve(calls), calls[0].name)

    # Called inside a request.

    def turn(self) -> None:
        """Let everybody else go on, then come back: for a request that waits on its neighbours."""
        task = greenlet.getcurrent()
        assert isinstance(task, Task)
        task.pause()

    def listen(self) -> None:
        """Hear what has come in, in a request that may not switch. Raises what ends this very request."""
        self.on_listen()
        task = self._inside()
        if task and task.ending is not None and not task._closing:
            task.cancel(task.ending)

    def why_alone(self, call: Call) -> Reason | None:
        """Why nothing can be joined with this call; None where it was alone by chance."""
        if call.key is None:
            return call.reason
        if self.trust.key(call) is None:
            return self.trust.label(call)
        return Reason.ROWS if 2 * call.rows > self.limits.of(call) else None

    def computed(self, task: Task, call: Call, value: Any) -> None:
        """A request computed its own call."""
        if task.memo_key is not None:
            self.memo.put(task.memo_key, call.module, value)

    def _inside(self) -> Task | None:
        """The request of this batcher in which the caller is."""
        current = greenlet.getcurrent()
        return current if isinstance(current, Task) and current.batcher is self else None

    # The end of requests.

    def cancel(self, task: Task, error: BaseException) -> None:
        """End `task` with `error` wherever it is. Neighbours do not notice.

        Inside a request it is only marked. That request itself ends when it next calls `listen`, or at its next
        module call; others end when it has parked: their `finally` blocks must find torch and the shared modules
        as they left them, not as the running request has set them for itself.
        """
        if task.done:
            return
        if self._inside():
            if task.ending is None:
                task.ending = error
                self._ending.append(task)
            return
        if task.state is State.QUEUED:
            self._queue.remove(task)
        task.cancel(error)
        self._active.pop(task.number, None)

    def close(self, error: BaseException) -> None:
        """End every task with `error`."""
        for task in [*self._queue, *self._active.values()]:
            self.cancel(task, error)

    def _end_marked(self) -> None:
        while self._ending:
            task = self._ending.pop()
            assert task.ending is not None
            self.cancel(task, task.ending)

    # Memory.

    def spare(self) -> int:
        """Drop what is kept for speed alone, as memory is short, and keep half as much from now on; its bytes."""
        freed = self.memo.spare() + self.joins.spare()
        self.prints.clear()
        return freed

    def forget(self) -> None:
        """Drop what is kept of earlier calls: for when a model is unloaded or its weights or adapters change."""
        self.memo.clear()
        self.joins.clear()
        self.limits.clear()
