"""The measurements, and what they are made of: figures that can be written as JSON and compared."""

from __future__ import annotations

import math
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from sfumato import __version__
from sfumato.commands.bench.runners import Compared
from sfumato.commands.bench.server import Server
from sfumato.errors import SfumatoError

PROMPT = "a lighthouse at dusk, oil on canvas"
FEW, MORE = 2, 6
"""Steps of the two pictures whose difference is the time of a step: what a picture costs besides is in both."""


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds that a denoising step takes for so many pictures at once; of each its share is the fraction of it."""

    size: str
    pictures: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Load:
    """So many clients, each of which asks for its next picture when it has one."""

    clients: int
    pictures: int
    per_second: float
    p50: float
    p95: float
    """Seconds from a request to its picture: half of them, and 95 of 100, took no longer."""


@dataclass(slots=True)
class Report:
    model: str
    machine: dict[str, Any]
    start_s: float
    """From the start of the process to the first answer of `/healthz`."""
    first_picture_s: float
    """Of the first request: loading the model, and drawing."""
    picture: dict[str, Any]
    """What the pictures under load are: size, steps, scheduler."""
    steps: list[Step] = field(default_factory=list)
    load: list[Load] = field(default_factory=list)
    model_bytes: int | None = None
    """Of its weights."""
    worker_bytes: int = 0
    """Resident memory of the process that draws, after all of it."""
    runners: dict[str, str] = field(default_factory=dict)
    """Component → what computed it at the end, as recipes name it."""
    compared: list[Compared] = field(default_factory=list)
    """Its runners beside each other, each by itself in this process; empty: not measured."""
    over_plain: dict[str, float] | None = None
    """Seconds for a picture by itself: of the server, of plain diffusers in the same turns, and the ratio."""


class Bench:
    """Measures one model of a running server."""

    def __init__(
        self, server: Server, model: str, size: str | None, steps: int | None, tell: Callable[[str], None]
    ) -> None:
        self._server = server
        self._fields = {"model": model, "size": size, "steps": steps}
        self._seed = 0
        self._lock = threading.Lock()
        self._tell = tell
        first = self.picture()
        facts = self._facts()
        drawn = {**facts["defaults"], **{name: value for name, value in self._fields.items() if value is not None}}
        self.report = Report(
            model, machine(), server.start_s, first,
            {name: drawn.get(name) for name in ("size", "steps", "guidance_scale", "scheduler")},
        )  # fmt: skip
        self._fields["size"] = drawn["size"]
        tell(f"started in {server.start_s:.1f} s, first picture after {first:.1f} s")

    def picture(self, **fields: Any) -> float:
        """Draw one; seconds from request to picture. Raises SfumatoError with what the server says."""
        with self._lock:
            self._seed += 1
            seed = self._seed
        body = {"prompt": PROMPT, "seed": seed, "response_format": "b64_json", **self._fields, **fields}
        began = time.perf_counter()
        answer = self._server.client.post(
            "/v1/images/generations", json={name: value for name, value in body.items() if value is not None}
        )
        taken = time.perf_counter() - began
        if not answer.is_success:
            raise SfumatoError(f"the server answered {answer.status_code}: {_message(answer)}")
        return taken

    def steps(self, sizes: Sequence[str], pictures: Sequence[int], repeats: int) -> None:
        """Seconds per step, by size and by how many are drawn at once."""
        for size in sizes:
            for count in pictures:
                self._at_once(count, size=size, steps=FEW)  # what a new shape costs once is not a step's
                seconds = []
                for _ in range(repeats):
                    few, more = (self._at_once(count, size=size, steps=number) for number in (FEW, MORE))
                    seconds.append((more - few) / (MORE - FEW))
                step = Step(size, count, round(max(0.0, statistics.median(seconds)), 5))
                self.report.steps.append(step)
                self._tell(f"{size}, {count} at once: {step.seconds:.3f} s a step")

    def under_load(self, clients: Sequence[int], pictures: int) -> None:
        """Throughput and waiting times; each client asks for so many pictures."""
        for count in clients:
            began = time.perf_counter()
            with ThreadPoolExecutor(count) as pool:
                waited = [
                    seconds
                    for each in pool.map(lambda _: [self.picture() for _ in range(pictures)], range(count))
                    for seconds in each
                ]
            wall = time.perf_counter() - began
            load = Load(
                count, len(waited), round(len(waited) / wall, 4),
                round(percentile(waited, 0.5), 4), round(percentile(waited, 0.95), 4),
            )  # fmt: skip
            self.report.load.append(load)
            self._tell(f"{count} clients: {load.per_second:.3f} pictures a second, p95 {load.p95:.2f} s")

    def against(self, draw: Callable[[], float], repeats: int) -> None:
        """A picture by itself, in turns with `draw`, which returns the seconds it took."""
        ours, theirs = [], []
        draw()
        for _ in range(repeats):
            ours.append(self.picture())
            theirs.append(draw())
        ratio = statistics.median(other / own for own, other in zip(ours, theirs, strict=True))
        own, other = statistics.median(ours), statistics.median(theirs)
        self.report.over_plain = {"sfumato": round(own, 4), "plain": round(other, 4), "ratio": round(ratio, 4)}

    def memory(self) -> None:
        facts = self._facts()
        self.report.model_bytes = facts["memory_bytes"]
        self.report.runners = {each["module"]: each["runner"] for each in facts["runners"] or ()}
        for line in self._server.client.get("/metrics").text.splitlines():
            if line.startswith("sfumato_worker_memory_bytes "):
                self.report.worker_bytes = int(float(line.split()[1]))

    def _at_once(self, count: int, **fields: Any) -> float:
        """Seconds until the last of so many requests is answered."""
        began = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda _: self.picture(**fields), range(count)))
        return time.perf_counter() - began

    def _facts(self) -> Any:
        return self._server.client.get(f"/v1/models/{self._fields['model']}").json()["sfumato"]


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 .. 1) of `values` do not exceed: nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "sfumato": __version__,
        "when": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


def _message(answer: Any) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(answer.text[:300])
