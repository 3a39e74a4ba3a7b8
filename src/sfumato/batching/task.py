"""One request: a greenlet that parks at its module calls and has its own torch state."""

from __future__ import annotations

import contextvars
from collections import Counter, deque
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import greenlet  # type: ignore[import-untyped]

from sfumato.batching import cpu_threads, policy, torch_state
from sfumato.batching.calls import Call, Fingerprints, describe
from sfumato.batching.outcomes import Compute, Outcome, Result
from sfumato.batching.prompt_cache import PromptCache
from sfumato.batching.reasons import Reason
from sfumato.batching.views import Asker, StandIn, View


class Host(Protocol):
    """What a request needs from the batcher that runs it."""

    now: int
    ambient: tuple[Any, ...]
    threads: int
    memo: PromptCache
    prints: Fingerprints
    alone: Counter[tuple[str, str]]

    def listen(self) -> None: ...

    def note_unbatched(self, name: str, reason: Reason, detail: str = "") -> None: ...

    def why_alone(self, call: Call) -> Reason | None: ...

    def count(self, name: str, calls: int, forwards: int) -> None: ...

    def computed(self, task: Task, call: Call, value: Any) -> None: ...


class Task(Asker):
    """One request. `outcome` is set once, when it has ended."""

    def __init__(self, batcher: Host, number: int, function: Callable[[], Any], priority: int, caller: str) -> None:
        super().__init__()
        self.batcher = batcher
        self.number = number
        self.priority = priority
        self.caller = caller
        self.left: int | None = None
        """Remaining denoising steps, if the submitter sets them; short requests overtake long ones."""
        self.threads: int | None = None
        """CPU threads while it computes and in batches that it leads; None: the process's number."""
        self.outcome: Outcome | None = None
        self.call: Call | None = None
        """The call it is parked at."""
        self.since = 0
        self.past: deque[Hashable] = deque(maxlen=policy.LONGEST_LOOP)
        """Its past calls as the policy sees them: their keys, or the callee for calls without a key."""
        self.waiting: policy.Waiting | None = None
        """Its call as the policy sees it."""
        self.ending: BaseException | None = None
        """The error to end it with as soon as no other request is running."""
        self.reply: Result | Compute | None = None
        self.memo_key: Hashable = None
        self.views: set[View] = set()
        self._function: Callable[[], Any] | None = function
        self._closing = ""
        self._random: torch_state.Random | None = None
        # A greenlet starts with an empty context; requests see the context variables of their submitter.
        self.gr_context = contextvars.copy_context()

    @property
    def done(self) -> bool:
        return self.outcome is not None

    def run(self) -> None:
        assert self._function is not None
        try:
            self.outcome = Outcome(value=self._function())
        except BaseException as error:  # a cancelled request ends here too; an error ends only its own request
            self.outcome = Outcome(error=error)
        finally:
            self._end()

    def ask(self, stand_in: StandIn, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A stand-in was called inside this request: park, or compute at once if it must not switch."""
        view: View = stand_in._sfumato_view
        self.views.add(view)
        batcher = self.batcher
        name = stand_in._sfumato_name
        # Autocast, grad mode etc. are per thread: switching now would leak them to other requests.
        reason = self._closing or view.occupied()
        if reason or torch_state.ambient() != batcher.ambient:
            batcher.listen()
            batcher.count(name, 1, 1)
            batcher.alone[name, str(reason or "in another state of torch than the rest")] += 1
            batcher.note_unbatched(name, view.reason(reason) if not self._closing else Reason.ENDING, reason)
            return stand_in._sfumato_compute(method, args, kwargs)
        call = describe(stand_in._sfumato_module, method, args, kwargs, batcher.prints, name)
        if apart := stand_in._sfumato_apart:
            call.key, call.alone = None, apart
            call.reason = Reason.CACHE if stand_in._sfumato_stateful else Reason.TILED
        if call.key is None:
            batcher.alone[name, call.alone] += 1
        self.memo_key = batcher.memo.key(call, batcher.prints) if call.key is not None else None
        reply = self._park(call)
        if isinstance(reply, Result):
            return reply.value
        batcher.count(name, 1, 1)
        if reply.trial is None and (unbatched := batcher.why_alone(call)):
            batcher.note_unbatched(name, unbatched, call.alone)
        try:
            value = stand_in._sfumato_compute(method, args, kwargs)
        except BaseException:
            if reply.trial:
                reply.trial.give_up(reply.member)
            raise
        batcher.computed(self, call, value)
        if reply.trial:
            reply.trial.report(reply.member, value)
        return value

    def resume(self) -> None:
        """Run until it parks or ends."""
        reply, self.reply, self.call = self.reply, None, None
        self._switch(lambda: self.switch(reply) if reply else self.switch())

    def cancel(self, error: BaseException) -> None:
        """End it now: raise `error` where it is parked; its `finally` blocks run without switching."""
        if self.done:
            return
        self._closing = "the request is being ended"
        if greenlet.getcurrent() is self:
            raise error
        self.call = None
        if not self:  # not started
            self.outcome = Outcome(error=error)
            self._end()
            return
        self._switch(lambda: self.throw(error))

    def _park(self, call: Call) -> Result | Compute:
        self.call = call
        self.since = self.batcher.now
        self.waiting = None
        self.past.append(call.key)
        reply = self.parent.switch()
        assert isinstance(reply, Result | Compute)
        return reply

    def _switch(self, into: Callable[[], Any]) -> None:
        # torch's global generator is part of a request: some pipelines and schedulers draw from it.
        self.parent = greenlet.getcurrent()
        if self._random is None:
            self._random = torch_state.seeded()
        found = torch_state.random()
        torch_state.set_random(self._random)
        try:
            with cpu_threads.using(self.threads or self.batcher.threads):
                into()
        finally:
            self._random = None if self.done else torch_state.random()
            torch_state.set_random(found)

    def _end(self) -> None:
        self._function = self.call = self.reply = None
        for view in self.views:
            view.close()
        self.views.clear()
