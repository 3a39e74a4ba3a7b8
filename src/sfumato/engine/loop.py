"""The worker's one thread: takes requests in order, draws each, answers each exactly once."""

from __future__ import annotations

import functools
import logging
import queue
from collections.abc import Callable
from typing import TypeAlias

from sfumato.core import Event, Failed, ModelStatus, Step
from sfumato.engine import generation
from sfumato.engine.protocol import Answer, Cancel, Command, Report, Status, Stop, Submit
from sfumato.engine.residency import Residency
from sfumato.errors import Cancelled, SfumatoError
from sfumato.settings import Settings

log = logging.getLogger(__name__)

Send: TypeAlias = Callable[[Report], None]


class Loop:
    """Runs commands until `Stop`. `post` may be called from any thread, the rest from the loop's own."""

    def __init__(self, settings: Settings, send: Send) -> None:
        self._inbox: queue.SimpleQueue[Submit | Stop] = queue.SimpleQueue()
        self._open: set[str] = set()
        self._cancelled: set[str] = set()
        self._send = send
        self._residency = Residency(settings.loaded_models, settings.device, self._tell)

    def post(self, command: Command) -> None:
        if isinstance(command, Cancel):
            if command.id in self._open:  # else it has been answered already
                self._cancelled.add(command.id)
            return
        if isinstance(command, Submit):
            self._open.add(command.generation.id)
        self._inbox.put(command)

    def run(self) -> None:
        """Until `Stop` comes; what was posted before it is answered first."""
        while not isinstance(command := self._inbox.get(), Stop):
            id = command.generation.id
            event = self._answer(command)
            self._open.discard(id)
            self._cancelled.discard(id)
            self._send(Answer(id, event))

    def _answer(self, submit: Submit) -> Event:
        request = submit.generation
        try:
            self._stop_if_cancelled(request.id)
            model = self._residency.get(submit.config)
            self._stop_if_cancelled(request.id)
            return generation.draw(model, request, functools.partial(self._on_step, request.id))
        except generation.Stopped:
            return Failed(Cancelled("the request was cancelled"))
        except SfumatoError as error:
            return Failed(error)
        except Exception as error:  # the loop outlives every request
            log.exception("request %s failed", request.id)
            return Failed(SfumatoError(f"{type(error).__name__}: {error}"))

    def _on_step(self, id: str, step: int, total: int) -> None:
        self._stop_if_cancelled(id)
        self._send(Answer(id, Step(step, total)))

    def _stop_if_cancelled(self, id: str) -> None:
        if id in self._cancelled:
            raise generation.Stopped

    def _tell(self, model: str, status: ModelStatus) -> None:
        self._send(Status(model, status))
