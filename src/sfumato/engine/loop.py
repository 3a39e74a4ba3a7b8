"""The loop of the worker's main thread: read commands, let the batcher run one group of module calls, report.

Some requests compute for a long time without yielding the thread (`batching.Batcher.listen`). The loop then reads
commands inside them, at each module call and step: it answers cancelled requests at once and queues new ones.
"""

from __future__ import annotations

import functools
import logging
import queue
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import TypeAlias

import torch

from sfumato import logs
from sfumato.batching import proof_store
from sfumato.batching.batcher import Batcher, Task
from sfumato.batching.interruption import Slices
from sfumato.batching.module_runner import ModuleRunner
from sfumato.batching.proof_store import Proofs
from sfumato.batching.verification import Verification
from sfumato.checkpoints.remote_limits import Limits
from sfumato.config import ModelConfig
from sfumato.core import BATCH, Done, Event, Failed, Generation, Step, keep_alive_seconds
from sfumato.drawing import named_nets, out_of_memory, preprocessors, two_passes
from sfumato.drawing.draw import Disturbed, Drawn, RunStopped, encoded, rounded
from sfumato.drawing.info import model_info
from sfumato.engine.protocol import (
    Answer,
    Cancel,
    Command,
    Load,
    Ordered,
    Pin,
    Placed,
    Report,
    Started,
    StatsReport,
    Status,
    Stop,
    Submit,
    Unload,
)
from sfumato.engine.stats import EVERY_S, Stats
from sfumato.errors import Cancelled, SfumatoError
from sfumato.formats import IMAGE, kind_of
from sfumato.models import estimators
from sfumato.models.content_hashes import ContentHashes
from sfumato.models.load import Loaded
from sfumato.models.sharing import Sharing
from sfumato.pictures.encoder import HERE, Encoder, EncoderThread
from sfumato.residency.budget import MIB, Budget
from sfumato.residency.idle_times import IdleTimes
from sfumato.residency.main_memory import MainMemory
from sfumato.residency.pool import ModelPool
from sfumato.residency.turns import Turns
from sfumato.runners.choice import Runners
from sfumato.settings import Settings, members
from sfumato.status import ModelInfo, ModelStatus, RunnerState

log = logging.getLogger(__name__)

Send: TypeAlias = Callable[[Report], None]

QUIET_S = 2.0
"""Seconds without a request after which runners are compared: between two of one client there is no such time."""


class Loop:
    """Runs commands until `Stop`. `post` may be called from any thread, the other methods only from the loop's thread.

    Each accepted generation is a task of the batcher, and is answered by exactly one `Done` or `Failed`.
    """

    def __init__(self, settings: Settings, send: Send, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds, for what is unloaded once it was idle for long enough."""
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        """None: a thread that loads a model, reads a LoRA, prepares a runner or encodes a picture has news."""
        self._send = send
        verification = Verification(proofs=Proofs(proof_store.of_server(settings.proofs, settings.data)))
        self._batcher = Batcher(
            max_rows=settings.max_batch,
            max_active=settings.max_active,
            verification=verification,
            on_listen=self._listen,
            slices=Slices(news=lambda: self._has_news),
        )
        self._turns = Turns()
        self._runners = Runners(
            settings.accelerate,
            settings.runners_folder,
            lambda: self._inbox.put(None),
            devices=members(settings.device),
        )
        self._pool = ModelPool(
            settings.loaded_models,
            settings.device,
            self._report_status,
            self._batcher.forget,
            self._batcher.free_caches,
            self._describe,
            known=Sharing(ContentHashes(settings.data / "hashes.json")),
            budget=Budget(settings.memory_mb * MIB, settings.vram_headroom * MIB),
            main_memory=MainMemory(settings.main_memory_mb * MIB),
            idle_times=IdleTimes(keep_alive_seconds(settings.keep_alive), clock),
            turns=self._turns,
            wake=lambda: self._inbox.put(None),
            loaded_loras=settings.loaded_loras,
            part_limits=Limits(bytes=settings.max_net_mb * MIB, setting="max_net_mb"),
            turn=functools.partial(self._batcher.turn, placed=True),
        )
        self._encoder = EncoderThread(functools.partial(self._batcher.turn, placed=True), lambda: self._inbox.put(None))
        self._stats = Stats(self._batcher, self._pool)
        self._estimators = {kind: str(getattr(settings, kind)) for kind in estimators.KINDS}
        self._submitted: dict[str, Submit] = {}
        """Generations without a task yet; those that arrive while a request runs wait here."""
        self._orders: list[Load] = []
        """Orders that arrived while a request ran: loading begins between turns."""
        self._tasks: dict[str, Task] = {}
        """Tasks of generations that are not drawn yet."""
        self._encoding: dict[str, Future[Done]] = {}
        """What is drawn and not yet answered. It needs no turn: one that does not switch holds no picture back."""
        self._loads: list[tuple[str, Task]] = []
        """Tasks that load a model for an order, each with the order's id; no request waits for them."""
        self._stopping = False
        self._clock = clock
        self._last = clock()
        """When the last command arrived, or the last request ended."""

    def post(self, command: Command) -> None:
        self._inbox.put(command)

    def run(self) -> None:
        """Run until `Stop`; commands posted before it are answered first."""
        with torch.no_grad():
            idle = not self._busy
            while self._busy or not self._stopping:
                self._receive(wait=idle)
                self._begin()
                with self._turns.turn():
                    computed = self._step()
                waits = self._has_threads and not computed
                self._report()
                idle = waits or not (self._busy or self._measure())
        self._pool.close()
        self._encoder.close()
        self._runners.close()

    def _step(self) -> bool:
        """One turn; whether any request went on, apart from those that wait for the load of a model."""
        before = self._batcher.now
        self._pool.tend()
        self._batcher.step()
        return self._batcher.now > before or any(task.done for task in self._all_tasks)

    def _measure(self) -> bool:
        """If nobody has asked for anything for a while: one forward pass to compare runners. Whether there are more."""
        if self._stopping or self._pool.loading or not self._runners.due:
            return False
        if self._clock() - self._last < QUIET_S:
            return False
        before = {name: self._reported(model) for name, model in self._pool.models.items()}
        with self._turns.turn():
            computed = self._runners.measure()
        for name, model in self._pool.models.items():
            if self._reported(model) != before.get(name):
                self._pool.describe_again(model)
                self._runners.keep_states(name, self._states(model))
        return computed

    @property
    def _has_threads(self) -> bool:
        """Whether requests may wait for a thread, which has news when it is ready."""
        reading = self._pool.loading or self._pool.reading_loras
        return reading or self._runners.preparing or self._encoder.busy or bool(self._encoding)

    @property
    def _busy(self) -> bool:
        return bool(self._tasks or self._encoding or self._loads or self._submitted or self._orders)

    @property
    def _has_news(self) -> bool:
        """Whether there is something to do before the next turn."""
        return bool(self._submitted or self._orders) or not self._inbox.empty()

    @property
    def _all_tasks(self) -> list[Task]:
        return [*self._tasks.values(), *(task for _, task in self._loads)]

    def _receive(self, *, wait: bool) -> None:
        """Read all commands that have arrived. `wait`: block until one arrives, or an idle model is to be unloaded."""
        if wait:
            with suppress(queue.Empty):
                self._handle(self._inbox.get(timeout=self._patience()))
        while not self._inbox.empty():  # only this thread reads it
            self._handle(self._inbox.get_nowait())

    def _patience(self) -> float | None:
        """Seconds until there is something to do without a command; None: never."""
        expiry = self._pool.until_expiry()
        if not self._has_threads:
            if not self._runners.due:
                return expiry
            quiet = max(0.0, QUIET_S - (self._clock() - self._last))
            return quiet if expiry is None else min(expiry, quiet)
        return EVERY_S if expiry is None else min(expiry, EVERY_S)  # a worker that loads is not taken for a hung one

    def _handle(self, command: Command | None) -> None:
        if command is not None:
            self._last = self._clock()
        match command:
            case Submit():
                self._submitted[command.generation.id] = command
            case Cancel(id):
                self._cancel(id)
            case Load():
                self._orders.append(command)
            case Unload(name, id):
                in_use = self._pool.unload(name)
                if id:
                    self._send(StatsReport(self._stats.stats()))  # who reads the answer sees the memory that is free
                    self._send(Ordered(id, in_use))
            case Pin(name, pinned):
                self._pool.pin(name, pinned)
            case Stop():
                self._stopping = True

    def _begin(self) -> None:
        """Start a task for each order, then for each generation."""
        orders, self._orders = self._orders, []
        for order in orders:
            self._loads.append((order.id, self._batcher.submit(functools.partial(self._load, order.config))))
        submitted, self._submitted = self._submitted, {}
        for id, submit in submitted.items():
            asked = submit.generation
            draw = functools.partial(self._draw, submit)
            task = self._batcher.submit(draw, caller=asked.caller, low=asked.priority == BATCH)
            task.deadline = asked.deadline
            task.steps = task.steps_left = asked.sampling.steps or submit.config.sampling.steps
            task.threads = submit.config.threads
            task.on_place = functools.partial(self._on_place, id)
            self._tasks[id] = task

    def _report(self) -> None:
        """Answer the requests that have ended, and those whose pictures are encoded."""
        answers: dict[str, Event] = {}
        for id, outcome in [(id, task.outcome) for id, task in self._tasks.items() if task.outcome]:
            if failure := _failure(f"request {id}", outcome.error):
                answers[id] = failure
            else:
                self._encoding[id] = outcome.value  # first: its last previews may be on their way
            del self._tasks[id]
            self._stats.ended(id)
        for id, future in [(id, future) for id, future in self._encoding.items() if future.done()]:
            del self._encoding[id]
            answers[id] = _failure(f"request {id}", future.exception()) or future.result()
        if answers:
            self._last = self._clock()
        loads, self._loads = self._loads, [(id, task) for id, task in self._loads if not task.done]
        loaded = {id: _failure("the load of a model", task.outcome.error) for id, task in loads if task.outcome}
        if loaded:
            self._stats.changed()
        # Before the answers: the counters must include a request once its answer is read.
        if self._stats.due(idle=not (self._tasks or self._loads)):
            self._send(StatsReport(self._stats.stats()))
        for id, failed in loaded.items():
            if id:
                self._send(Ordered(id, error=failed.error if failed else None))
        for id, event in answers.items():
            self._send(Answer(id, event))

    def _listen(self) -> None:
        """Called inside a request that does not yield the thread: read commands and send answers."""
        self._receive(wait=False)
        self._report()

    def _cancel(self, id: str) -> None:
        """Answer at once. A running request ends when it next calls `listen`, a parked one at its next turn."""
        task = self._tasks.get(id)
        if task and not task.done:
            log.info("request %s was cancelled with %s steps left", id, task.steps_left)
            del self._tasks[id]
            self._stats.ended(id)
            self._batcher.cancel(task, RunStopped())
        elif encoding := self._encoding.pop(id, None):
            encoding.cancel()  # what has begun asks `_runs`
        elif not self._submitted.pop(id, None):
            return  # already answered, or about to be
        self._send(Answer(id, _CANCELLED))

    # Within the tasks.

    def _draw(self, submit: Submit) -> Future[Done]:
        """Runs in the request's greenlet, from its first turn to its end. Returns the picture, being encoded."""
        id, long = submit.generation.id, kind_of(submit.generation.format) != IMAGE
        self._send(Started(id))
        log.info("request %s starts", id)
        on_step = functools.partial(self._on_step, submit.generation)
        on_preview = functools.partial(self._send_running, id)
        keeping_its_place = functools.partial(self._batcher.turn, placed=True)
        keep_alive, low = submit.generation.keep_alive, submit.generation.priority == BATCH
        while True:
            with (
                self._pool.use(submit.config, self._batcher.turn, keep_alive, low=low) as model,
                suppress(Disturbed),
                self._batcher.placed(),  # it took no place while the model was loaded
            ):

                def run(generation: Generation, model: Loaded = model) -> Drawn:
                    # For each try: one with less memory draws on other modules.
                    given = generation, self._pool, keeping_its_place
                    runners = self._runners_of(model, generation)
                    with (
                        named_nets.beside(model, *given) as named,
                        preprocessors.beside(named, *given, self._estimators) as drawn,
                    ):
                        return two_passes.picture(drawn, generation, on_step, on_preview, runners, self._encoder)

                self._stats.started(id)
                before = self._reported(model)
                try:
                    memory = self._batcher.free_caches, self._batcher.let_long_calls_end
                    picture = out_of_memory.with_less(model, submit.generation, run, *memory)
                    if long:  # it may wait for other files; its floats do not
                        picture = self._encoder.result(functools.partial(rounded, picture))
                    wanted = functools.partial(self._runs, id)
                    return self._encoder.begin(functools.partial(encoded, picture, wanted), long=long)
                finally:
                    if self._reported(model) != before:
                        self._pool.describe_again(model)
            log.warning("request %s is drawn again: another request left its model changed", id)

    def _runners_of(self, model: Loaded, generation: Generation) -> Mapping[int, ModuleRunner | None]:
        """Chosen once for a request: no picture depends on when another runner became ready."""
        config, kept = model.config, model.state.runners
        divide = bool(config.context_parallel)
        return self._runners.of(
            model.computing(), kept, config.accelerate, config.threads, generation.runner, divide=divide
        )

    def _describe(self, model: Loaded) -> ModelInfo:
        return replace(model_info(model), runners=self._states(model))

    def _states(self, model: Loaded) -> tuple[RunnerState, ...]:
        config, kept = model.config, model.state.runners
        return self._runners.states(model.computing(), kept, config.accelerate, divide=bool(config.context_parallel))

    def _reported(self, model: Loaded) -> object:
        """What a request may change of what is reported about a model."""
        return model.savings, self._states(model)

    def _load(self, config: ModelConfig) -> None:
        """Load a model; progress and errors appear in its status."""
        self._pool.preload(config, self._batcher.turn)

    def _on_step(self, generation: Generation, step: int, total: int) -> None:
        id = generation.id
        if task := self._tasks.get(id):
            task.steps_left = total - step
            self._stats.stepped(id)
            # The thread that makes its previews sends them: each comes between the steps that it is between.
            encoder: Encoder = self._encoder if generation.previews else HERE
            encoder.later(functools.partial(self._send_running, id, Step(step, total)))
        self._batcher.listen()

    def _on_place(self, id: str, taken: bool) -> None:
        if id in self._tasks:
            self._send(Placed(id, taken))

    def _send_running(self, id: str, event: Event) -> None:
        """Called in the threads that encode, too."""
        if self._runs(id):
            self._send(Answer(id, event))

    def _runs(self, id: str) -> bool:
        """Whether it is neither answered nor cancelled. Called in the threads that encode, too."""
        return id in self._tasks or id in self._encoding

    def _report_status(self, model: str, status: ModelStatus) -> None:
        """May be called in the thread that loads."""
        self._stats.changed()
        self._send(Status(model, status))


_CANCELLED = Failed(Cancelled("the request was cancelled"))


def _failure(label: str, error: BaseException | None) -> Failed | None:
    """The terminal event of what ended with `error`; None if it ended well. Logs unexpected errors, with `label`."""
    match error:
        case None:
            return None
        case RunStopped():
            return _CANCELLED
        case SfumatoError():
            return Failed(error)
        case _:
            log.error("%s failed: %s", label, logs.error_location(error))
            return Failed(SfumatoError(f"{type(error).__name__}: {error}"))
