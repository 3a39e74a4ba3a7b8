"""The state of the server for those who look at it: models, memory, the line, and how much was drawn lately."""

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
from sfumato.serving.service import Service

EVERY_S = 5.0
SAMPLES = 120
"""Ten minutes."""


class ModelState(BaseModel):
    id: str
    status: str = Field(description="unloaded, downloading, loading, ready or failed.")
    detail: str = Field(description="What is fetched, or why it failed or left.")
    progress: float | None = Field(description="0 to 1 while it is downloaded.")
    pinned: bool = Field(description="Stays in memory while others leave.")
    device: str | None
    dtype: str | None


class Memory(BaseModel):
    """Of the process that computes, in bytes."""

    resident: int
    device: int = Field(description="Allocated on the accelerator.")


class Line(BaseModel):
    """Pictures of all callers."""

    waiting: int
    drawing: int
    places: int = Field(description="So many are drawn at a time; others wait.")
    limit: int = Field(description="So many may wait; a request beyond is refused with 429.")


class Sample(BaseModel):
    """A few seconds of work."""

    seconds_ago: float
    steps_per_s: float
    pictures_per_min: float
    mean_batch: float | None = Field(description="Requests that shared a forward of the denoiser; null: none ran.")


class ServerState(BaseModel):
    """How the server is. It tells nothing of what anybody asked for."""

    object: str
    version: str
    uptime_s: float
    ready: bool
    keeps_pictures: bool = Field(description="Whether pictures that are answered as base64 are in the gallery too.")
    models: list[ModelState]
    memory: Memory
    line: Line
    steps: int = Field(description="Denoising steps since the server started.")
    pictures: int
    mean_batch: float | None
    history: list[Sample] = Field(description=f"The last {SAMPLES * EVERY_S / 60:.0f} minutes, oldest first.")


@dataclass(frozen=True, slots=True)
class Totals:
    """What had been done at a time."""

    time: float
    steps: int
    pictures: int
    forwards: int
    rows: int
    """Requests in these forwards, one counted for each forward that it shared."""


class History:
    """Counts of the last minutes, taken by `keep` until it is cancelled."""

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
        here = counts[-1].time
        return [
            {
                "seconds_ago": round(here - after.time, 1),
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
    summary="Models, memory, the line and throughput",
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
        "memory": {"resident": stats.memory_bytes, "device": stats.device_memory_bytes},
        "line": {
            "waiting": service.queue.waiting,
            "drawing": service.queue.running,
            "places": service.settings.max_active,
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
    }


def _mean(rows: int, forwards: int) -> float | None:
    return round(rows / forwards, 2) if forwards > 0 else None
