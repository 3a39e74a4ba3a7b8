"""The state of the server: models, memory, the queue, and recent throughput."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from sfumato import __version__
from sfumato.api.dependencies import TheService, part
from sfumato.api.http import documents
from sfumato.engine.protocol import DeviceState
from sfumato.serving.service import Service
from sfumato.status import EngineStats

EVERY_S = 5.0
SAMPLES = 120
"""Ten minutes of samples."""


class ModelState(BaseModel):
    id: str
    status: str = Field(description="unloaded, downloading, loading, ready, in_main_memory or failed.")
    detail: str = Field(description="What is being downloaded, or why it failed or was unloaded.")
    progress: float | None = Field(description="0 to 1 while downloading.")
    pinned: bool = Field(description="Kept in memory when other models need room.")
    device: str | None
    dtype: str | None
    memory_bytes: int | None = Field(description="What its weights take in memory; null if it is not loaded.")


class Memory(BaseModel):
    """Memory of worker processes, in bytes."""

    resident: int
    device: int = Field(description="Memory allocated on the accelerator.")


class Device(BaseModel):
    """A device that draws, with its worker process."""

    name: str = Field(description="As in the setting `devices`; with one worker the setting `device`.")
    ready: bool = Field(description="Whether its worker is up.")
    problem: str = Field(description="Why its worker does not start; empty if it is up, or starting.")
    pictures: int = Field(description="Pictures that it has been sent and has not answered yet.")
    memory: Memory
    models: dict[str, str] = Field(description="Status of each model that its worker has had to do with.")


class Line(BaseModel):
    """The queue: pictures of all callers."""

    waiting: int
    drawing: int
    places: int = Field(
        description="Maximum pictures in flight, besides those of the priority `batch`: half as many more; others wait."
    )
    limit: int = Field(description="Maximum pictures waiting; requests beyond it get a 429.")


class Sample(BaseModel):
    """Throughput over a few seconds."""

    seconds_ago: float
    steps_per_s: float
    pictures_per_min: float
    mean_batch: float | None = Field(description="Mean requests per forward pass of the denoiser; null: none ran.")


class ServerState(BaseModel):
    """The state of the server. Contains nothing about the contents of requests."""

    object: str
    version: str
    uptime_s: float
    ready: bool
    keeps_pictures: bool = Field(description="Whether pictures returned as base64 are also stored in the gallery.")
    models: list[ModelState]
    memory: Memory = Field(description="Of all devices together.")
    devices: list[Device]
    line: Line
    steps: int = Field(description="Denoising steps since the server started.")
    pictures: int
    mean_batch: float | None
    history: list[Sample] = Field(description=f"The last {SAMPLES * EVERY_S / 60:.0f} minutes, oldest first.")


@dataclass(frozen=True, slots=True)
class Totals:
    """Counters at a point in time."""

    time: float
    steps: int
    pictures: int
    forwards: int
    rows: int
    """Requests in these forward passes, each counted once per forward pass."""


class History:
    """Counters of the last minutes, recorded by `keep` until it is cancelled."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.began = time.monotonic()
        """When the application was made."""
        self._counts: deque[Totals] = deque([self.now()], maxlen=SAMPLES + 1)

    async def keep(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            self._counts.append(self.now())

    def now(self) -> Totals:
        stats = self._service.engine.stats
        forwards = sum(stats.batch_sizes.values())
        rows = sum(size * count for size, count in stats.batch_sizes.items())
        return Totals(time.monotonic(), stats.steps, self._service.metrics.pictures, forwards, rows)

    def samples(self) -> list[dict[str, Any]]:
        counts = [*self._counts, self.now()]
        latest = counts[-1].time
        return [
            {
                "seconds_ago": round(latest - after.time, 1),
                "steps_per_s": round((after.steps - before.steps) / (after.time - before.time), 2),
                "pictures_per_min": round(60 * (after.pictures - before.pictures) / (after.time - before.time), 2),
                "mean_batch": _mean(after.rows - before.rows, after.forwards - before.forwards),
            }
            for before, after in itertools.pairwise(counts)
            if after.time - before.time > 1
        ]


TheHistory: TypeAlias = Annotated[History, Depends(part("history"))]

routes = APIRouter(tags=["Operations"])


@routes.get(
    "/status",
    summary="Models, memory, the queue and throughput",
    response_model=ServerState,
    responses=documents.errors(401, 403),
)
async def status(service: TheService, history: TheHistory) -> dict[str, Any]:
    service.catalog.refresh()
    stats, now = service.engine.stats, history.now()
    return {
        "object": "server",
        "version": __version__,
        "uptime_s": round(time.monotonic() - history.began, 1),
        "ready": service.engine.ready,
        "keeps_pictures": service.settings.keep_pictures,
        "models": [_model(service, config.name, service.pinned(config)) for config in service.catalog.all()],
        "memory": _memory(stats),
        "devices": [_device(service, each) for each in service.engine.devices],
        "line": {
            "waiting": service.queue.waiting,
            "drawing": service.queue.running,
            "places": service.queue.places,
            "limit": service.settings.max_queue,
        },
        "steps": now.steps,
        "pictures": now.pictures,
        "mean_batch": _mean(now.rows, now.forwards),
        "history": history.samples(),
    }


def _model(service: Service, name: str, pinned: bool) -> dict[str, Any]:
    status = service.engine.status(name)
    return {
        "id": name,
        "status": status.state,
        "detail": status.detail,
        "progress": status.progress,
        "pinned": pinned,
        "device": status.info and status.info.device,
        "dtype": status.info and status.info.dtype,
        "memory_bytes": status.info and status.info.memory_bytes,
    }


def _memory(stats: EngineStats) -> dict[str, int]:
    return {"resident": stats.memory_bytes, "device": stats.device_memory_bytes}


def _device(service: Service, device: DeviceState) -> dict[str, Any]:
    names = {config.name for config in service.catalog.all()}
    return {
        "name": device.name,
        "ready": device.ready,
        "problem": device.problem,
        "pictures": device.pictures,
        "memory": _memory(device.stats),
        "models": {name: status.state for name, status in sorted(device.models.items()) if name in names},
    }


def _mean(rows: int, forwards: int) -> float | None:
    return round(rows / forwards, 2) if forwards > 0 else None
