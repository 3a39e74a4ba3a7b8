"""The interface between the service and its engines, and the messages that cross it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from sfumato.config import ModelConfig
from sfumato.core import Event, Generation
from sfumato.errors import SfumatoError
from sfumato.status import EngineStats, ModelStatus

OnPlace: TypeAlias = Callable[[str, bool], None]
"""Called with the id of a generation, and whether it takes a place (see `Placed`); also when it begins, with one."""

OnDevice: TypeAlias = Callable[[str, str], None]
"""Called with the id of a generation, and the name of the device that has it from now on: there it takes a place, also
before it begins."""


@dataclass(frozen=True, slots=True)
class DeviceState:
    """A device and its worker."""

    name: str
    """As in the setting `devices`; `cpu:0`, `cpu:1` ... if several workers have the CPU. Of one worker: `device`."""
    ready: bool
    """Whether its worker is up."""
    problem: str
    """Why its worker does not start; empty if it is up, or starting."""
    pictures: int
    """Pictures that it has been sent and has not answered yet."""
    stats: EngineStats
    models: Mapping[str, ModelStatus]
    """Every model that its worker has reported."""


class Engine(Protocol):
    """Draws pictures. Implementations: `supervisor` (a child process), `devices` (one for each device), `local` (a
    thread of this one)."""

    on_place: OnPlace
    on_device: OnDevice
    """Of an engine with several devices."""
    on_places: Callable[[int], None]
    """Called with how many pictures can be drawn at a time, when devices begin or cease to be able to draw."""

    async def start(self) -> None:
        """Accept requests from now on; returns at once, requests wait until the worker is up."""

    async def stop(self) -> None:
        """Let running requests finish within the grace time, fail the rest, and stop."""

    def submit(self, config: ModelConfig, generation: Generation) -> AsyncGenerator[Event, None]:
        """Events of one generation: any number of `Step` and `Preview`, then one `Done` or `Failed`.

        Closing the generator cancels the work within one denoising step.
        """

    def order(self, command: Order) -> None:
        """Load, unload or pin a model, as soon as a worker is up; `status` reports the progress."""

    async def carry_out(self, command: Load | Unload) -> Ordered:
        """As `order`, and returns when it is done: the model is loaded or has failed to load, memory is free again."""

    def status(self, model: str) -> ModelStatus:
        """State of the model of that name; with several devices, where it is closest to being ready."""

    @property
    def devices(self) -> Sequence[DeviceState]:
        """Each device, in the order of the setting."""

    @property
    def ready(self) -> bool:
        """Whether any worker is up and ready to draw."""

    @property
    def stats(self) -> EngineStats:
        """The counters so far, of all devices together, at most about a second old."""


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
    """Load a model before the first request needs it."""

    config: ModelConfig
    id: str = ""
    """If set, an `Ordered` with this id follows."""


@dataclass(frozen=True, slots=True)
class Unload:
    """Unload a model (None: all), each as soon as no request uses it."""

    model: str | None
    id: str = ""
    """If set, an `Ordered` with this id follows."""


@dataclass(frozen=True, slots=True)
class Pin:
    """Pin or unpin a model, whatever its file says."""

    model: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish running requests, then exit."""


# From the worker.


@dataclass(frozen=True, slots=True)
class Ready:
    """The handshake: the worker has imported torch and accepts requests."""

    device: str
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Unusable:
    """Instead of the handshake: the worker cannot use its device, and exits."""

    reason: str


@dataclass(frozen=True, slots=True)
class Started:
    """This generation has left the queue; if the worker dies from now on, it may be the cause."""

    id: str


@dataclass(frozen=True, slots=True)
class Placed:
    """This generation takes one of the engine's places again; or none from now on, while its model is loaded, or until
    the next worker starts it."""

    id: str
    taken: bool


@dataclass(frozen=True, slots=True)
class Answer:
    id: str
    event: Event


@dataclass(frozen=True, slots=True)
class Status:
    model: str
    status: ModelStatus


@dataclass(frozen=True, slots=True)
class Ordered:
    """A `Load` or `Unload` was carried out."""

    id: str
    in_use: tuple[str, ...] = ()
    """Models that are unloaded only when the requests that use them have ended."""
    error: SfumatoError | None = None
    """Why the model could not be loaded."""


@dataclass(frozen=True, slots=True)
class StatsReport:
    """Counters since this worker started."""

    stats: EngineStats


Order: TypeAlias = Load | Unload | Pin
Command: TypeAlias = Submit | Cancel | Order | Stop
Report: TypeAlias = Ready | Unusable | Started | Placed | Answer | Status | Ordered | StatsReport
