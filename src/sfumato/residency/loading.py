"""A model that is being loaded, in a thread of its own, while requests for other models go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeAlias

import torch

from sfumato import allocator
from sfumato.batching import cpu_threads
from sfumato.config import ModelConfig
from sfumato.errors import Cancelled, SfumatoError
from sfumato.models.footprint import Needs
from sfumato.models.load import Loaded
from sfumato.residency.turns import Turns
from sfumato.status import ModelStatus

Load: TypeAlias = Callable[[ModelConfig, Callable[[ModelStatus], None], Callable[[Needs], None]], Loaded]

CANCELLED = "loading was cancelled, as nothing waits for the model any more"


def _nothing() -> None: ...


class Loading:
    """One load. It stops between fetching and reading the weights, until `admit` or `refuse` is called.

    `needs`, `done`, `model` and `error` are written by the thread that loads, all else by the loop's.
    """

    def __init__(
        self,
        config: ModelConfig,
        load: Load,
        on_status: Callable[[ModelStatus], None],
        waiting_model: Loaded | None = None,
        began: float = 0.0,
    ) -> None:
        self.config = config
        self.began = began
        """When it was first wanted, in seconds of the pool's clock."""
        self.waiting_model = waiting_model
        """The model, if it waits in main memory and only has to come back."""
        self.requests = 0
        """Requests that wait for it."""
        self.orders = 0
        """Orders that wait for it."""
        self.low = 0
        """Those of the requests that are of low priority."""
        self.threads = torch.get_num_threads()
        """CPU threads: those of the request that began it."""
        self.begun = False
        self.needs: Needs | None = None
        """The memory it takes, while it waits for `admit` or `refuse`."""
        self.cancelled = False
        self.done = False
        self.model: Loaded | None = None
        self.error: BaseException | None = None
        self._load = load
        self._on_status = on_status
        self._move: Callable[[], None] = _nothing
        self._answered = threading.Event()
        self._refusal: SfumatoError | None = None

    def join(self, order: bool, low: bool = False) -> None:
        """One more waits for it."""
        self.orders += order
        self.requests += not order
        self.low += low

    def leave(self, order: bool, low: bool = False) -> None:
        """One of them does not wait any more."""
        self.orders -= order
        self.requests -= not order
        self.low -= low

    @property
    def waiting(self) -> int:
        """How many wait for it."""
        return self.requests + self.orders

    def start(self, turns: Turns, wake: Callable[[], None]) -> None:
        """Begin, in a thread; `wake` is called there whenever the loop has something to do for it."""
        self.begun, self.done, self.error = True, False, None
        if not self.cancelled:
            self._answered.clear()

        def run() -> None:
            with ExitStack() as stack, torch.no_grad():
                self._run(wake, lambda: _begin_to_read(stack, turns))
            self.done = True
            wake()

        threading.Thread(target=run, name="sfumato-load", daemon=True).start()

    def admit(self, move: Callable[[], None] = _nothing) -> None:
        """There is room for it, once its thread has called `move`."""
        self.needs, self._move = None, move
        self._answered.set()

    def refuse(self, error: SfumatoError) -> None:
        """There is no room for it, and never will be: the load ends with this error."""
        self._refusal = error
        self.admit()

    def cancel(self) -> None:
        """It ends at its next report, and leaves nothing in memory."""
        self.cancelled = True
        self._answered.set()

    def _run(self, wake: Callable[[], None], begin_to_read: Callable[[], None]) -> None:
        def make_room(needs: Needs) -> None:
            self.needs = needs
            wake()
            self._answered.wait()
            self.needs = None
            move, self._move = self._move, _nothing
            move()  # also if it was cancelled since: others count on it
            self._report(None)
            if self._refusal:
                raise self._refusal
            begin_to_read()

        try:
            with cpu_threads.using(self.threads):
                self.model = self._load(self.config, self._report, make_room)
        except BaseException as error:  # it belongs to those who wait for this model
            self.error = error

    def _report(self, status: ModelStatus | None) -> None:
        if self.cancelled:
            raise Cancelled(CANCELLED)
        if status:
            self._on_status(status)


def _begin_to_read(stack: ExitStack, turns: Turns) -> None:
    stack.enter_context(turns.loading())
    stack.enter_context(allocator.separate_large_blocks())
