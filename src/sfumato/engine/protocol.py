"""The seam between the service and whatever computes, and the messages that cross it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from sfumato.config import ModelConfig
from sfumato.core import EngineStats, Event, Generation, ModelStatus


class Engine(Protocol):
    """Draws pictures. Implementations: `supervisor` (a child process), `local` (a thread of this one)."""

    async def start(self) -> None:
        """Make ready to take requests; returns at once, requests wait until the worker is up."""

    async def stop(self) -> None:
        """Let what runs come to its end within the grace time, fail the rest, and go."""

    def submit(self, config: ModelConfig, generation: Generation) -> AsyncGenerator[Event, None]:
        """Events of one generation: any number of `Step`, then one `Done` or `Failed`.

        Closing the generator cancels the work within one denoising step.
        """

    def order(self, command: Order) -> None:
        """Have a model loaded, unloaded or pinned, as soon as a worker is up to do it; `status` says how it goes."""

    def status(self, model: str) -> ModelStatus:
        """Where the model of that name stands."""

    @property
    def ready(self) -> bool:
        """Whether a worker is up to draw."""

    @property
    def stats(self) -> EngineStats:
        """What it counted so far, at most about a second old."""


# To the worker.


@dataclass(frozen=True, slots=True)
class Submit:
    config: ModelConfig
    generation: Generation


@dataclass(frozen=True, slots=True)
class Cancel:
    id: str


@dataclass(frozen=True, slots=True)
class Load:
    """Bring a model into memory before somebody draws with it."""

    config: ModelConfig


@dataclass(frozen=True, slots=True)
class Unload:
    """Let a model go, or with None every one, each as soon as nobody draws with it."""

    model: str | None


@dataclass(frozen=True, slots=True)
class Pin:
    """Whether a model stays while others leave, whatever its file says."""

    model: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish what runs, then exit."""


# From the worker.


@dataclass(frozen=True, slots=True)
class Ready:
    """The handshake: the worker has imported torch and takes requests."""

    device: str
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Started:
    """This generation has left the queue; from now on it may be the reason if the worker dies."""

    id: str


@dataclass(frozen=True, slots=True)
class Answer:
    id: str
    event: Event


@dataclass(frozen=True, slots=True)
class Status:
    model: str
    status: ModelStatus


@dataclass(frozen=True, slots=True)
class StatsReport:
    """Since this worker started."""

    stats: EngineStats


Order: TypeAlias = Load | Unload | Pin
Command: TypeAlias = Submit | Cancel | Order | Stop
Report: TypeAlias = Ready | Started | Answer | Status | StatsReport
