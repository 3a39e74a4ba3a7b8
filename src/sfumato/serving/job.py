"""One accepted request: its progress, and its pictures as they are finished."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from sfumato.config import ModelConfig
from sfumato.core import Done, Generation, Preview, Step, StorePicture
from sfumato.errors import Cancelled, SfumatoError
from sfumato.pictures.budget import Share
from sfumato.serving import repeat
from sfumato.serving.queue import Queue, Ticket
from sfumato.serving.time_limits import DrawingTime

CANCELLED = "the request was cancelled"

JobState: TypeAlias = Literal["queued", "drawing", "completed", "failed", "cancelled"]


class Arrival:
    """A request whose body has not been read yet: only its caller and its id are known."""

    def __init__(self, id: str, caller: str) -> None:
        self.id = id
        self.caller = caller
        self.cancelled = asyncio.Event()
        self.submitted = False
        """Whether it has become a job."""

    def submit(self) -> None:
        """Turn it into a job. Raises Cancelled if it was cancelled in the meantime."""
        if self.cancelled.is_set():
            raise Cancelled(CANCELLED)
        self.submitted = True

    def progress(self) -> Progress:
        return Progress(
            id=self.id,
            caller=self.caller,
            model="",
            prompt="",
            state="cancelled" if self.cancelled.is_set() else "queued",
            step=0,
            total=0,
            pictures_done=0,
            pictures=0,
            queue_position=0,
            seconds_left=None,
        )


@dataclass(slots=True)
class Part:
    """One picture of a request."""

    generation: Generation
    ticket: Ticket
    time: DrawingTime
    step: int = 0
    total: int = 0
    """Denoising steps; 0 until the first is complete."""
    device: str = ""
    """The one of several devices that draws it, or has drawn it."""
    first_step_at: float | None = None
    """When its first step completed, in seconds of the monotonic clock."""
    preview: Preview | None = None
    """The latest preview."""
    done: Done | None = None
    name: str | None = None
    """Its name in the store."""

    def place(self, queue: Queue, taken: bool) -> None:
        """The engine has begun with it, or goes on; or, not `taken`, it waits for its model or for a worker."""
        queue.place(self.ticket, taken)
        self.time.count(taken)

    def update(self, event: Step | Preview | Done) -> None:
        match event:
            case Step(step, total):
                self.step, self.total = step, total
                if self.first_step_at is None or step == 1:
                    self.first_step_at = time.monotonic()
            case Preview():
                self.preview = event
            case Done():
                self.done = event
                self.step = self.total


@dataclass(frozen=True, slots=True)
class Progress:
    """Snapshot of a job."""

    id: str
    caller: str
    model: str
    """Empty until the body is read."""
    prompt: str
    """The first picture's prompt."""
    state: JobState
    step: int
    total: int
    """Total steps of all pictures; unstarted ones count as many as the others, or 0 if none has started."""
    pictures_done: int
    pictures: int
    queue_position: int
    """Turns until its first waiting picture is drawn; 0 if none waits."""
    seconds_left: float | None
    """Estimate; None if nothing is known yet, or the job has ended."""
    devices: tuple[str, ...] = ()
    """Those of several that draw its pictures, or have drawn them."""
    kept: tuple[tuple[int, str, int], ...] = ()
    """For each finished and stored picture: its index, its name in the store and its seed."""
    error: SfumatoError | None = None
    """Why it ended without pictures."""


@dataclass(slots=True, eq=False)
class Job:
    """Made by `Service.submit`. The reader of `events` or `pictures` owns it: stopping early cancels it,
    unless it is detached."""

    id: str
    """The request's id; callers may choose it, so it need not be unique."""
    caller: str
    config: ModelConfig
    queue: Queue
    parts: Sequence[Part]
    share: Share
    """Its share of the budget for source pictures."""
    created: float = field(default_factory=repeat.now)
    """Seconds since 1970."""
    detached: bool = False
    """Continues even if its client disconnects."""
    keep: StorePicture | None = None
    deadline: float | None = None
    """When it should be done, in seconds since 1970."""
    error: SfumatoError | None = None
    task: asyncio.Task[None] | None = None
    first_event: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at its first event, or its end."""
    _events: asyncio.Queue[tuple[int, Step | Preview | Done] | None] = field(default_factory=asyncio.Queue)

    async def events(self) -> AsyncGenerator[tuple[int, Step | Preview | Done], None]:
        """(picture index, event) until all are done. Raises the error that ended the job."""
        try:
            while (event := await self._events.get()) is not None:
                yield event
        finally:
            self.leave()
        if self.error:
            raise self.error

    async def pictures(self) -> list[Done]:
        """All pictures in order. Raises the error that ended the job."""
        try:
            assert self.task is not None
            await asyncio.wait([self.task])
        finally:
            self.leave()
        if self.error:
            raise self.error
        return [part.done for part in self.parts if part.done]

    def cancel(self) -> None:
        """End it within one denoising step; its reader gets `Cancelled`. Does nothing if it has ended."""
        if self.task and not self.task.done():
            self.task.cancel()

    def leave(self) -> None:
        """The client has disconnected: cancel it, unless it is detached."""
        if not self.detached:
            self.cancel()

    def put(self, index: int, event: Step | Preview | Done) -> None:
        self.parts[index].update(event)
        self._events.put_nowait((index, event))
        self.first_event.set()

    def end(self, error: SfumatoError | None = None) -> None:
        self.error = error
        self._events.put_nowait(None)
        self.first_event.set()

    @property
    def over(self) -> bool:
        return self.task is None or self.task.done()

    @property
    def state(self) -> JobState:
        if self.error:
            return "cancelled" if isinstance(self.error, Cancelled) else "failed"
        if all(part.done for part in self.parts):
            return "completed"
        return "queued" if all(part.ticket.since is None and not part.done for part in self.parts) else "drawing"

    def progress(self) -> Progress:
        longest = max(part.total for part in self.parts)
        positions = [position for part in self.parts if (position := self.queue.position(part.ticket))]
        return Progress(
            id=self.id,
            caller=self.caller,
            model=self.config.name,
            prompt=self.parts[0].generation.prompt,
            state=self.state,
            step=sum(part.step for part in self.parts),
            total=sum(part.total or longest for part in self.parts),
            pictures_done=sum(part.done is not None for part in self.parts),
            pictures=len(self.parts),
            queue_position=min(positions, default=0),
            seconds_left=None if self.over else self._seconds_left(),
            devices=tuple(dict.fromkeys(part.device for part in self.parts if part.device)),
            kept=tuple((index, part.name, part.generation.seed) for index, part in enumerate(self.parts) if part.name),
            error=self.error,
        )

    def _seconds_left(self) -> float | None:
        """Estimate until its last picture is done: from each one's own pace, or from recent pictures."""
        estimates = [self._picture_seconds_left(part) for part in self.parts if not part.done]
        known = [seconds for seconds in estimates if seconds is not None]
        return max(known, default=0.0) if len(known) == len(estimates) else None

    def _picture_seconds_left(self, part: Part) -> float | None:
        if part.first_step_at is not None and part.step > 1:
            pace = (time.monotonic() - part.first_step_at) / (part.step - 1)
            return pace * (part.total - part.step)
        position, low = self.queue.position(part.ticket), part.ticket.line.low
        mean = self.queue.mean_s(low)
        return None if mean is None else mean + (self.queue.wait_s(position, low=low) or 0.0)
