"""One request: a greenlet that parks at its module calls, with the state of torch that is its own."""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from enum import IntEnum, auto
from types import MappingProxyType
from typing import Any, Protocol

import greenlet  # type: ignore[import-untyped]

from sfumato.batching import cpu_threads, policy, torch_state
from sfumato.batching.calls import Call, Fingerprints, describe
from sfumato.batching.counts import Counts
from sfumato.batching.outcomes import Compute, Outcome, Reply, Result
from sfumato.batching.prompt_cache import PromptCache
from sfumato.batching.reasons import Reason
from sfumato.batching.stand_in import Asker, StandIn
from sfumato.batching.views import View


class State(IntEnum):  # plain ones are slow to look up
    """Where a request stands."""

    QUEUED = auto()
    """Submitted; others have all places."""
    READY = auto()
    """It may run: it has a place, or the answer to its call."""
    RUNNING = auto()
    """The thread is in its code, or in what that has called."""
    PARKED = auto()
    """At a module call, until it has an answer."""
    PAUSED = auto()
    """It has given its turn away (`Batcher.turn`) and runs again in the next."""
    ENDED = auto()
    """It has an outcome."""


NEXT: Mapping[State, frozenset[State]] = MappingProxyType({
    State.QUEUED: frozenset({State.READY, State.ENDED}),
    State.READY: frozenset({State.RUNNING, State.ENDED}),
    State.RUNNING: frozenset({State.PARKED, State.PAUSED, State.ENDED}),
    State.PARKED: frozenset({State.READY, State.RUNNING, State.ENDED}),
    State.PAUSED: frozenset({State.RUNNING, State.ENDED}),
    State.ENDED: frozenset(),
})  # fmt: skip
"""What may follow on what. Who is parked runs without an answer when it is cancelled, for its `finally` blocks; and
ends without running when nobody refers to it any more and Python closes its greenlet."""


class Host(Protocol):
    """What a request needs of the batcher that runs it."""

    now: int
    ambient: tuple[Any, ...]
    threads: int
    memo: PromptCache
    prints: Fingerprints
    counts: Counts

    def listen(self) -> None: ...

    def why_alone(self, call: Call) -> Reason | None: ...

    def computed(self, task: Task, call: Call, value: Any) -> None: ...


class Task(Asker):
    """One request. `outcome` is set once, when it has ended."""

    def __init__(self, batcher: Host, number: int, function: Callable[[], Any], caller: str) -> None:
        super().__init__()
        self.batcher = batcher
        self.number = number
        self.caller = caller
        self.state = State.QUEUED
        self.left: int | None = None
        """Denoising steps still to do, if whoever submitted it says so; short requests overtake long ones."""
        self.threads: int | None = None
        """CPU threads while it computes and in batches that it leads; None: as many as the process has."""
        self.outcome: Outcome | None = None
        self.call: Call | None = None
        """What it is parked at, until it runs again."""
        self.since = 0
        """How many forwards had run when it parked."""
        self.past: deque[Hashable] = deque(maxlen=policy.LONGEST_LOOP)
        """What it parked at so far, as the policy sees it: keys, and for calls without one what is called."""
        self.waiting: policy.Waiting | None = None
        """Its call as the policy sees it."""
        self.ending: BaseException | None = None
        """With what it is to end as soon as nobody else is in the middle of something."""
        self.memo_key: Hashable = None
        """Of its call in the prompt cache; None for what is not kept there."""
        self.views: set[View] = set()
        self._reply: Reply | None = None
        self._function: Callable[[], Any] | None = function
        self._closing = ""
        self._random: torch_state.Random | None = None
        # A greenlet starts with an empty context; requests see the variables of whoever submitted them.
        self.gr_context = contextvars.copy_context()

    @property
    def done(self) -> bool:
        return self.outcome is not None

    # Called by the batcher.

    def admit(self) -> None:
        """It has a place, and may begin."""
        self._become(State.READY)

    def answer(self, reply: Reply) -> None:
        """What becomes of the call that it is parked at."""
        self._become(State.READY)
        self._reply = reply

    def resume(self) -> None:
        """Run it until it parks, pauses or ends."""
        reply, self._reply, self.call = self._reply, None, None
        self._run(lambda: self.switch(reply) if reply else self.switch())

    def cancel(self, error: BaseException) -> None:
        """End it now with `error`, which is raised where it is parked; its `finally` blocks run, without a switch."""
        if self.done:
            return
        self._closing = "the request is being ended"
        if greenlet.getcurrent() is self:
            raise error
        self.call = None
        if not self:  # it has not begun
            self._end(Outcome(error=error))
            return
        self._run(lambda: self.throw(error))

    # Called inside the request, in its greenlet.

    def run(self) -> None:
        assert self._function is not None
        try:
            outcome = Outcome(value=self._function())
        except BaseException as error:  # a cancelled request ends here too, and an error belongs to its request alone
            outcome = Outcome(error=error)
        self._end(outcome)

    def pause(self) -> None:
        """Give the turn away; comes back in the next."""
        self._become(State.PAUSED)
        self.parent.switch()

    def ask(self, stand_in: StandIn, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A stand-in was called inside this request: park, or compute at once where it must not switch."""
        self.views.add(stand_in._sfumato_view)
        if reason := self._must_not_switch(stand_in):
            self.batcher.listen()
            self._count_unswitched(stand_in, reason)
            return stand_in._sfumato_compute(method, args, kwargs)
        call = self._described(stand_in, method, args, kwargs)
        reply = self._park(call)
        return reply.value if isinstance(reply, Result) else self._compute(stand_in, call, reply)

    def _must_not_switch(self, stand_in: StandIn) -> str:
        """Why; empty where it may."""
        reason: str = self._closing or stand_in._sfumato_view.occupied()
        # Autocast, grad mode and the like belong to the thread: switching inside would give them to others.
        if not reason and torch_state.ambient() != self.batcher.ambient:
            return OTHER_STATE
        return reason

    def _count_unswitched(self, stand_in: StandIn, reason: str) -> None:
        view, name, counts = stand_in._sfumato_view, stand_in._sfumato_name, self.batcher.counts
        counts.add(name, 1, 1)
        counts.alone[name, reason] += 1
        occupied = "" if reason == OTHER_STATE else reason
        counts.add_unbatched(name, Reason.ENDING if self._closing else view.reason(occupied), occupied)

    def _described(self, stand_in: StandIn, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        batcher, name = self.batcher, stand_in._sfumato_name
        call = describe(stand_in._sfumato_module, method, args, kwargs, batcher.prints, name)
        if apart := stand_in._sfumato_apart:
            call.key, call.alone = None, apart
            call.reason = Reason.CACHE if stand_in._sfumato_stateful else Reason.TILED
        if call.key is None:
            batcher.counts.alone[name, call.alone] += 1
        self.memo_key = batcher.memo.key(call, batcher.prints) if call.key is not None else None
        return call

    def _park(self, call: Call) -> Reply:
        self.call = call
        self.since = self.batcher.now
        self.waiting = None
        self.past.append(call.key)
        self._become(State.PARKED)
        reply = self.parent.switch()
        assert isinstance(reply, Result | Compute)
        return reply

    def _compute(self, stand_in: StandIn, call: Call, told: Compute) -> Any:
        """Its own call, as if nothing were in between."""
        batcher, trial = self.batcher, told.trial
        batcher.counts.add(call.name, 1, 1)
        if trial is None and (unbatched := batcher.why_alone(call)):
            batcher.counts.add_unbatched(call.name, unbatched, call.alone)
        try:
            value = stand_in._sfumato_compute(call.method, call.args, call.kwargs)
        except BaseException:
            if trial:
                trial.raised(told.member)
            raise
        batcher.computed(self, call, value)
        if trial:
            trial.computed(told.member, value)
        return value

    # Of both.

    def _become(self, state: State) -> None:
        assert state in NEXT[self.state], f"a request that is {self.state.name} cannot become {state.name}"
        self.state = state

    def _run(self, into: Callable[[], Any]) -> None:
        """Let its greenlet go on by `into`, with its own state of torch, until control comes back."""
        self._become(State.RUNNING)
        # torch's global generator is part of a request: some pipelines and schedulers draw from it.
        self.parent = greenlet.getcurrent()
        if self._random is None:
            self._random = torch_state.seeded()
        before = torch_state.random()
        torch_state.set_random(self._random)
        try:
            with cpu_threads.using(self.threads or self.batcher.threads):
                into()
        finally:
            self._random = None if self.done else torch_state.random()
            torch_state.set_random(before)

    def _end(self, outcome: Outcome) -> None:
        self._become(State.ENDED)
        self.outcome = outcome
        self._function = self.call = self._reply = None
        for view in self.views:
            view.close()
        self.views.clear()


OTHER_STATE = "in another state of torch than the rest"
