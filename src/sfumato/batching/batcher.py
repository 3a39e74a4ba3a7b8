"""The core: many requests on one thread, parked at their module calls, sharing forward passes.

Each request is a greenlet that runs unmodified code (a pipeline, on a `views.view`). Where that code calls
a heavy module, the greenlet parks and control returns to the `Batcher`, which picks a group of compatible
parked calls, runs one forward pass for all of them, and resumes each with its rows of the result. A call
compatible with no other is computed by its own greenlet, as if the batcher did not exist.

`Batcher.step` is one turn: admit, resume, choose, run, scatter. Nothing here knows about pipelines or the meaning
of a request. `policy.choose` is the policy, `calls` the batching rule, `verification` decides what may be batched.
"""

from __future__ import annotations

import functools
import itertools
import logging
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import greenlet  # type: ignore[import-untyped]
import torch

from sfumato.batching import cpu_threads, offload, outputs, policy, proof, torch_state
from sfumato.batching.calls import Call, Fingerprints, differing, target
from sfumato.batching.concatenation import ConcatenationCache, join
from sfumato.batching.outcomes import Compute, Count, Outcome, Result, is_out_of_memory
from sfumato.batching.outputs import Unsplittable
from sfumato.batching.prompt_cache import PromptCache
from sfumato.batching.proof import Evidence
from sfumato.batching.reasons import Reason
from sfumato.batching.task import Task
from sfumato.batching.verification import Trial, Verification, Width

__all__ = ["Batcher", "Count", "Outcome", "Task", "is_out_of_memory"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Batcher:
    """Runs tasks on the thread that calls `step`. Call all methods on that thread."""

    max_rows: int = 8
    """Maximum rows of a forward pass. A request with guidance usually has two; one with more than this runs alone."""
    max_active: int = 16
    """Maximum requests in flight. Each keeps its tensors in memory."""
    patience: int = policy.PATIENCE
    on_listen: Callable[[], None] = lambda: None
    """Called before each call of a request that runs without switching, so that commands are read meanwhile."""
    trust: Verification = field(default_factory=Verification)
    memo: PromptCache = field(default_factory=PromptCache)
    prints: Fingerprints = field(default_factory=Fingerprints)
    joins: ConcatenationCache = field(default_factory=ConcatenationCache)
    counts: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    shared: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Module name and number of calls in a forward pass → number of such forward passes."""
    alone: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Module name and reason → calls that could not be batched; `trust.refused` has those refused by a trial."""
    unbatched: Counter[tuple[str, Reason]] = field(default_factory=Counter)
    """Module name and kind of reason → calls that could not have been batched with any other."""
    now: int = 0
    """Number of turns so far in which something was computed."""
    ambient: tuple[Any, ...] = ()
    threads: int = field(default_factory=torch.get_num_threads)
    """CPU threads for requests that do not set a number."""
    _ending: list[Task] = field(default_factory=list)
    _queue: deque[Task] = field(default_factory=deque)
    _active: dict[int, Task] = field(default_factory=dict)
    _caps: dict[Hashable, int] = field(default_factory=dict)
    _given: dict[str, float] = field(default_factory=dict)
    _widths: dict[Hashable, tuple[weakref.ref[Any], int, Width]] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def submit(self, function: Callable[[], Any], *, priority: int = 0, caller: str = "") -> Task:
        """Queue a request: `function` runs in a greenlet and may call pipelines on views."""
        task = Task(self, next(self._numbers), function, priority, caller)
        self._queue.append(task)
        return task

    def step(self) -> bool:
        """One turn; False when there is nothing left to do. At most one module call per request is computed."""
        self.ambient = torch_state.ambient()
        self.threads = torch.get_num_threads()
        self._admit()
        self._go_on()
        if group := self._choose():
            self.now += 1
            self._run(group)
            self._end_marked()
        return bool(self._active or self._queue)

    def turn(self) -> None:
        """Called inside a request that waits for others: let all others continue once, then return."""
        task = greenlet.getcurrent()
        assert isinstance(task, Task)
        task.parent.switch()

    def listen(self) -> None:
        """Called inside a request that may not switch: read new commands. Raises if one of them ends this request."""
        self.on_listen()
        task = self._inside()
        if task and task.ending is not None and not task._closing:
            task.cancel(task.ending)

    def cancel(self, task: Task, error: BaseException) -> None:
        """End `task` with `error` wherever it is, without effect on other tasks.

        While a request runs, the task is only marked. The running request itself ends at its next `listen` or
        module call; others end once it has parked: their `finally` blocks must find torch and the shared modules
        as they left them, not as the running request has set them.
        """
        if task.done:
            return
        if self._inside():
            if task.ending is None:
                task.ending = error
                self._ending.append(task)
            return
        if task in self._queue:
            self._queue.remove(task)
        task.cancel(error)
        self._active.pop(task.number, None)

    def close(self, error: BaseException) -> None:
        """End every task with `error`."""
        for task in [*self._queue, *self._active.values()]:
            self.cancel(task, error)

    def spare(self) -> int:
        """Memory is short: drop all caches and halve their limits; returns the bytes freed."""
        freed = self.memo.spare() + self.joins.spare()
        self.prints.clear()
        return freed

    def forget(self) -> None:
        """Drop cached results: call it when a model is unloaded or its weights or adapters change."""
        self.memo.clear()
        self.joins.clear()
        self._widths.clear()
        self._caps.clear()

    def count(self, name: str, calls: int, forwards: int) -> None:
        self.counts[name].calls += calls
        self.counts[name].forwards += forwards
        if calls and forwards:
            self.shared[name, calls] += forwards

    def note_unbatched(self, name: str, reason: Reason, detail: str = "") -> None:
        """Count a call of this module that had to run alone. Refusals by a proof are logged there."""
        if (name, reason) not in self.unbatched and detail:
            log.info("calls of %s are not batched (%s): %s", name, reason, detail)
        self.unbatched[name, reason] += 1

    def why_alone(self, call: Call) -> Reason | None:
        """Why this call cannot be batched; None if it was alone by chance."""
        if call.key is None:
            return call.reason
        if self._key(call) is None:
            return self.trust.label(call)
        return Reason.ROWS if 2 * call.rows > self._limit(call) else None

    def computed(self, task: Task, call: Call, value: Any) -> None:
        """Count a call that a request computed itself."""
        if task.memo_key is not None:
            self.memo.put(task.memo_key, call.module, value)

    def _inside(self) -> Task | None:
        """The request of this batcher that is running now, if any."""
        current = greenlet.getcurrent()
        return current if isinstance(current, Task) and current.batcher is self else None

    # One turn, in the order in which it happens.

    def _admit(self) -> None:
        while self._queue and len(self._active) < self.max_active:
            task = self._queue.popleft()
            self._active[task.number] = task
            # A caller who returns after a while has not accumulated turns.
            had = [self._given[other.caller] for other in self._active.values() if other.caller in self._given]
            self._given[task.caller] = max(self._given.get(task.caller, 0.0), min(had, default=0.0))

    def _go_on(self) -> None:
        """Resume requests that need no forward pass, or whose call is in the prompt cache, until all are parked."""
        self._answer_known()
        ready = [task for task in self._active.values() if task.call is None or task.reply is not None]
        while ready:
            for task in ready:
                self._resume(task)
            self._end_marked()
            self._answer_known()
            ready = [task for task in self._active.values() if task.reply is not None]

    def _end_marked(self) -> None:
        while self._ending:
            task = self._ending.pop()
            assert task.ending is not None
            self.cancel(task, task.ending)

    def _resume(self, task: Task) -> None:
        self._end_marked()
        if task.done:  # cancelled by another one in this turn
            return
        task.resume()
        if task.outcome is not None:
            self._active.pop(task.number, None)
            if not self._active:
                self._given.clear()
            if isinstance(task.outcome.error, KeyboardInterrupt | SystemExit):
                raise task.outcome.error
        if torch_state.ambient() != self.ambient:
            # Requests park only in the ambient state; this one ended without restoring it.
            log.warning(
                "request %d left torch's state changed: %s, was %s", task.number, torch_state.ambient(), self.ambient
            )
            torch_state.restore(self.ambient)

    def _choose(self) -> list[Task]:
        parked = [task for task in self._active.values() if task.call is not None and task.reply is None]
        waiting = [self._waiting(task, call) for task in parked if (call := task.call)]
        by_number = {task.number: task for task in parked}
        calls = policy.choose(waiting, self.now, self._room, lambda caller: self._given.get(caller, 0.0), self.patience)
        return [by_number[call.id] for call in calls]

    def _waiting(self, task: Task, call: Call) -> policy.Waiting:
        key = self._key(call)
        if (
            task.waiting is None or task.waiting.key != key
        ):  # just parked, or a trial changed which calls are compatible
            task.past[-1] = key if key is not None else (id(call.module), call.method)
            task.waiting = policy.Waiting(
                id=task.number,
                key=key,
                rows=call.rows,
                since=task.since,
                priority=task.priority,
                caller=task.caller,
                left=task.left,
                loop=policy.loop(list(task.past)),
            )
        return task.waiting

    def _run(self, group: list[Task]) -> None:
        leaders: dict[Hashable, Task] = {}
        for task in group:
            if task.call is not None:
                self._given[task.caller] = self._given.get(task.caller, 0.0) + task.call.rows
            # Equal texts are computed once; the others get it from the prompt cache before the next forward pass.
            leaders.setdefault(task.memo_key if task.memo_key is not None else task.number, task)
        members = list(leaders.values())
        if len(members) == 1:
            self._tell(members[0], Compute())
            return
        with cpu_threads.using(members[0].threads or self.threads):
            self._run_together(members)

    def _run_together(self, members: list[Task]) -> None:
        calls = [task.call for task in members if task.call is not None]
        first = calls[0]
        signature = self.trust.signature(first, differing(calls))
        ruling = self.trust.ruling(first, signature)
        try:
            output = target(first.module, first.method)(**join(calls, self.joins))
            parts = outputs.split(output, [call.rows for call in calls], listed=first.listed)
        except Unsplittable as reason:
            self.trust.refuse(first, signature, str(reason))
            self.count(first.name, 0, 1)
            self._all_alone(members)
            return
        except Exception as error:  # whatever a module raises: find out which call caused it
            self.count(first.name, 0, 1)
            if is_out_of_memory(error):
                self._shrink(calls)
                return
            log.info("a batch of %d calls of %s failed: %r", len(calls), first.name, error)
            self._all_alone(
                members, Trial([None] * len(members), lambda _: self._fails_only_together(first, signature))
            )
            return
        if ruling == "try":
            self._prove(members, calls, signature, parts)
            return
        self.count(first.name, len(members), 1)
        for task, part in zip(members, parts, strict=True):
            if task.memo_key is not None:
                self.memo.put(task.memo_key, first.module, part)
            task.reply = Result(part)

    def _prove(self, members: list[Task], calls: list[Call], signature: str, parts: list[Any]) -> None:
        """The first batch of its kind: prove it. In any case every member gets the result it computes alone."""
        first = calls[0]
        try:
            evidence = proof.examine(calls, lambda some: join(some, ConcatenationCache()))
        except Exception as error:  # the batch worked, but failed with other contents
            self.count(first.name, 0, 1)
            if is_out_of_memory(error):
                self._shrink(calls)
                return
            if proof.is_half(first):
                why = f"raised {type(error).__name__} when the other rows were changed"
                self.trust.refuse(first, signature, why, Reason.UNPROVEN)
            evidence = Evidence(parts, rounding=[proof.TOLERANCE] * len(calls))
        self.count(first.name, 0, 1)
        self.counts[first.name].proving += evidence.forwards
        if self.trust.ruling(first, signature) == "no":
            self._all_alone(members)
        elif evidence.refused:
            self.trust.settle(first, signature, evidence, [])
            self._all_alone(members)
        else:
            settle = functools.partial(self.trust.settle, first, signature, evidence)
            self._all_alone(members, Trial(evidence.parts, settle))

    def _all_alone(self, members: list[Task], trial: Trial | None = None) -> None:
        for member, task in enumerate(members):
            self._tell(task, Compute(trial, member))

    def _tell(self, task: Task, reply: Result | Compute) -> None:
        task.reply = reply
        self._resume(task)

    def _fails_only_together(self, call: Call, signature: str) -> None:
        self.trust.refuse(call, signature, "the batch raised, each member alone did not")

    def _answer_known(self) -> None:
        for task in self._active.values():
            if task.call is not None and task.reply is None and task.memo_key is not None:
                known = self.memo.get(task.memo_key)
                if known:
                    self.count(task.call.name, 1, 0)
                    task.reply = Result(known[0])

    def _key(self, call: Call) -> Hashable:
        if call.key is None:
            return None
        known = self._widths.get(call.key)
        if known is None or known[0]() is not call.module or known[1] != self.trust.changes:
            if len(self._widths) > 4096:
                self._widths.clear()
            known = self._widths[call.key] = (weakref.ref(call.module), self.trust.changes, self.trust.width(call))
        return None if known[2] is None else call.narrowed(known[2])

    def _room(self, waiting: policy.Waiting) -> int:
        call = self._active[waiting.id].call
        assert call is not None
        return self._limit(call)

    def _limit(self, call: Call) -> int:
        """Maximum rows of a forward pass of this kind."""
        return min(self.max_rows, self._caps.get(_sizes(call), self.max_rows)) if self._caps else self.max_rows

    def _shrink(self, calls: list[Call]) -> None:
        """Out of memory: drop the caches; if they were empty, halve the rows for this module and shape.

        The members stay parked, and the next turn retries them.
        """
        freed = self.spare()
        offload.empty_cache()
        if freed:
            log.warning("out of memory: dropped %d bytes of cached results for %s", freed, calls[0].name)
            return
        sizes = _sizes(calls[0])
        self._caps[sizes] = max(1, sum(call.rows for call in calls) // 2)
        log.warning("out of memory: at most %d rows for %s of this size", self._caps[sizes], calls[0].name)


def _sizes(call: Call) -> Hashable:
    """Module and shapes without rows or contents: the key of a remembered row limit."""
    shapes = [(leaf.path, leaf.value.shape[1:]) for leaf in call.leaves if leaf.kind in ("rows", "multi", "ragged")]
    return (id(call.module), call.method, tuple(shapes))
