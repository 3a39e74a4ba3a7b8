"""One request: a greenlet that parks at its module calls and has its own torch random state."""

from __future__ import annotations

import contextvars
import functools
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from enum import IntEnum, auto
from types import MappingProxyType
from typing import Any, Protocol

import greenlet  # type: ignore[import-untyped]

from sfumato.batching import cpu_threads, interruption, policy, torch_state
from sfumato.batching.calls import Call, Fingerprints, describe
from sfumato.batching.counts import Counts
from sfumato.batching.forward_times import ForwardTimes
from sfumato.batching.interruption import Slices
from sfumato.batching.outcomes import Compute, Outcome, Reply, Result
from sfumato.batching.prompt_cache import PromptCache
from sfumato.batching.reasons import Reason
from sfumato.batching.stand_in import CallHandler, StandIn
from sfumato.batching.views import View


class State(IntEnum):  # members of a plain Enum are slow to look up
    """State of a request."""

    QUEUED = auto()
    """Submitted, and waits for a place."""
    READY = auto()
    """May run: it has just got a place, or the reply to its call."""
    RUNNING = auto()
    """The thread runs its code."""
    PARKED = auto()
    """Waits at a module call for a reply."""
    BATCHED = auto()
    """Its call is part of a long forward pass that has been interrupted."""
    PAUSED = auto()
    """Has yielded its turn (`Batcher.turn`) and runs again in the next one."""
    INTERRUPTED = auto()
    """Computes a long call of its own, and goes on after a forward pass of others."""
    ENDED = auto()
    """Has an outcome."""


NEXT: Mapping[State, frozenset[State]] = MappingProxyType({
    State.QUEUED: frozenset({State.READY, State.ENDED}),
    State.READY: frozenset({State.RUNNING, State.ENDED}),
    State.RUNNING: frozenset({State.PARKED, State.PAUSED, State.INTERRUPTED, State.ENDED}),
    State.PARKED: frozenset({State.BATCHED, State.READY, State.RUNNING, State.ENDED}),
    State.BATCHED: frozenset({State.PARKED, State.READY, State.RUNNING, State.ENDED}),
    State.INTERRUPTED: frozenset({State.RUNNING, State.ENDED}),
    State.PAUSED: frozenset({State.RUNNING, State.ENDED}),
    State.ENDED: frozenset(),
})  # fmt: skip
"""Allowed transitions. A parked request runs without a reply when it is cancelled, for its `finally` blocks; it ends
without running when nothing refers to it any more and Python closes its greenlet."""


class Host(Protocol):
    """What a request needs from the batcher that runs it."""

    now: int
    ambient: tuple[Any, ...]
    threads: int
    prompt_cache: PromptCache
    fingerprints: Fingerprints
    counts: Counts
    slices: Slices
    times: ForwardTimes

    def listen(self) -> None: ...

    def why_alone(self, call: Call) -> Reason | None: ...

    def computed(self, task: Task, call: Call, value: Any, by: str) -> None: ...


class Task(CallHandler):
    """One request. `outcome` is set once, when it ends."""

    def __init__(self, batcher: Host, number: int, function: Callable[[], Any], caller: str, low: bool = False) -> None:
        super().__init__()
        self.batcher = batcher
        self.number = number
        self.caller = caller
        self.low = low
        """Whether it yields to interactive requests."""
        self.deadline: float | None = None
        """When it should be done, if the submitter sets it; it only orders its caller's requests."""
        self.state = State.QUEUED
        self.steps_left: int | None = None
        """Remaining denoising steps, if the submitter sets them; short requests overtake long ones."""
        self.steps: int | None = None
        """All its denoising steps, if the submitter sets them."""
        self.threads: int | None = None
        """CPU threads while it computes and in batches that it leads; None: the default of the process."""
        self.outcome: Outcome | None = None
        self.call: Call | None = None
        """The call at which it is parked, until it runs again."""
        self.since = 0
        """Number of forward passes that had run when it parked."""
        self.latents = 0
        """Of the latest call that it computed itself; see `interruption.latents_of`."""
        self.went_on = 0
        """`now` of the batcher when that last went on after an interruption."""
        self.past_keys: deque[Hashable] = deque(maxlen=policy.LONGEST_LOOP)
        """Keys of its latest calls, for the policy; for calls without a key, module and method."""
        self.waiting: policy.Waiting | None = None
        """Its call as the policy sees it."""
        self.pending_error: BaseException | None = None
        """The error to end it with as soon as no other request is running."""
        self.prompt_key: Hashable = None
        """Key of its call in the prompt cache; None if the call is not cached there."""
        self.views: set[View] = set()
        self.placed = False
        """Whether it takes one of the batcher's places; not while it waits for others."""
        self.on_place: Callable[[bool], None] = lambda placed: None
        """Called when it gives up its place, and when it has one again."""
        self.returns = False
        """Whether it waits for a place again, and for nothing else."""
        self._reply: Reply | None = None
        self._function: Callable[[], Any] | None = function
        self._closing = ""
        self._random: torch_state.Random | None = None
        # A greenlet starts with an empty context; a request sees the variables of its submitter.
        self.gr_context = contextvars.copy_context()

    @property
    def done(self) -> bool:
        return self.outcome is not None

    @property
    def payer(self) -> Hashable:
        """Whose share of the forward passes it takes: a caller's interactive requests do not pay for its others."""
        return self.caller, self.low

    # Called by the batcher.

    def admit(self) -> None:
        """It gets a place and may begin."""
        self.placed = True
        self._become(State.READY)

    def batch(self) -> None:
        """Its call is now part of a long forward pass."""
        self._become(State.BATCHED)

    def park_again(self) -> None:
        """That forward pass ran out of memory."""
        self._become(State.PARKED)

    def place(self, placed: bool) -> None:
        """It gives up its place, or has one again."""
        self.returns = False
        if placed is not self.placed:
            self.placed = placed
            self.on_place(placed)

    def answer(self, reply: Reply) -> None:
        """The reply to the call at which it is parked."""
        self._become(State.READY)
        self._reply = reply

    def resume(self) -> None:
        """Run it until it parks, pauses or ends."""
        reply, self._reply, self.call = self._reply, None, None
        self._run(lambda: self.switch(reply) if reply else self.switch())

    def cancel(self, error: BaseException) -> None:
        """End it now: raise `error` where it is parked; its `finally` blocks run without switching."""
        if self.done:
            return
        self._closing = "the request is being ended"
        if greenlet.getcurrent() is self:
            raise error
        self.call = None
        if not self:  # it has not started
            self._end(Outcome(error=error))
            return
        self._run(lambda: self.throw(error))

    # Called inside the request, in its greenlet.

    def run(self) -> None:
        assert self._function is not None
        try:
            outcome = Outcome(value=self._function())
        except BaseException as error:  # including cancellation; an error ends only its own request
            outcome = Outcome(error=error)
        self._end(outcome)

    def pause(self) -> None:
        """Yield the turn; returns in the next one."""
        self._become(State.PAUSED)
        self.parent.switch()

    def handle_call(self, stand_in: StandIn, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A stand-in was called inside this request: park, or compute at once if it must not switch."""
        self.views.add(stand_in._sfumato_view)
        if reason := self._must_not_switch(stand_in):
            self.batcher.listen()
            self._count_unswitched(stand_in, reason)
            stand_in._sfumato_computed()  # not by its runner, which knows nothing of what the request has changed
            return stand_in._sfumato_compute(method, args, kwargs)
        if runner := stand_in._sfumato_runner:
            while not runner.prepare(method, args, kwargs):
                self.pause()
        call = self._described(stand_in, method, args, kwargs)
        reply = self._park(call)
        if not isinstance(reply, Result):
            return self._compute(stand_in, call, reply)
        stand_in._sfumato_computed(reply.by)
        return reply.value

    def _must_not_switch(self, stand_in: StandIn) -> str:
        """Why this request must not switch now; empty if it may."""
        reason: str = self._closing or stand_in._sfumato_view.why_no_switch()
        # Autocast and grad mode belong to the thread: a switch inside them would apply them to other requests.
        if not reason and torch_state.ambient() != self.batcher.ambient:
            return OTHER_STATE
        return reason

    def _count_unswitched(self, stand_in: StandIn, reason: str) -> None:
        view, name, counts = stand_in._sfumato_view, stand_in._sfumato_name, self.batcher.counts
        counts.add(name, 1, 1)
        counts.alone_because[name, reason] += 1
        changes = "" if reason == OTHER_STATE else reason
        counts.add_unbatched(name, Reason.ENDING if self._closing else view.reason(changes), changes)

    def _described(self, stand_in: StandIn, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        batcher, name = self.batcher, stand_in._sfumato_name
        module, selection = stand_in._sfumato_module, stand_in._sfumato_selection
        runner = stand_in._sfumato_runner
        call = describe(module, method, args, kwargs, batcher.fingerprints, name, selection, runner)
        if apart := stand_in._sfumato_apart:
            call.key, call.alone_because = None, apart
            call.reason = Reason.CACHE if stand_in._sfumato_stateful else Reason.TILED
        if call.key is None:
            batcher.counts.alone_because[name, call.alone_because] += 1
        self.prompt_key = batcher.prompt_cache.key(call, batcher.fingerprints) if call.key is not None else None
        return call

    def _park(self, call: Call) -> Reply:
        self.call = call
        self.since = self.batcher.now
        self.waiting = None
        self.past_keys.append(call.key)
        self._become(State.PARKED)
        reply = self.parent.switch()
        assert isinstance(reply, Result | Compute)
        return reply

    def _compute(self, stand_in: StandIn, call: Call, reply: Compute) -> Any:
        """Compute its own call, as without batching."""
        batcher, trial = self.batcher, reply.trial
        self.latents, self.went_on = interruption.latents_of(call), 0
        batcher.counts.add(call.name, 1, 1)
        if trial is None and (unbatched := batcher.why_alone(call)):
            batcher.counts.add_unbatched(call.name, unbatched, call.alone_because)
        try:
            before_part = functools.partial(self._before_part, stand_in)
            begun = batcher.times.begin(call)
            value, by = stand_in._sfumato_run(call.method, call.args, call.kwargs, before_part)
            batcher.times.end(begun, call, call.rows)
            # A proof is about the module itself.
            own = call.run() if trial and call.runner else value
        except BaseException:
            if trial:
                trial.raised(reply.member)
            raise
        batcher.computed(self, call, value, by)
        if trial:
            trial.computed(reply.member, own)
        return value

    def _before_part(self, stand_in: StandIn, on_host: bool) -> None:
        """Within a long call of its own: let others compute, if it is time."""
        if self.batcher.slices.over(on_host) and not self._must_not_switch(stand_in):
            self._become(State.INTERRUPTED)
            self.parent.switch()

    # Used on both sides.

    def _become(self, state: State) -> None:
        assert state in NEXT[self.state], f"a request that is {self.state.name} cannot become {state.name}"
        self.state = state

    def _run(self, into: Callable[[], Any]) -> None:
        """Enter its greenlet by `into`, with its own random state, until control returns."""
        self._become(State.RUNNING)
        # Each request has its own state of torch's global generator: some pipelines and schedulers draw from it.
        self.parent = greenlet.getcurrent()
        if self._random is None:
            self._random = torch_state.derived()
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
