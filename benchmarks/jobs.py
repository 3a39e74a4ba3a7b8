"""What a key and `Prefer: respond-async` cost: a request through HTTP with them, over the same request without.

    python -m benchmarks.jobs

A server whose engine draws nothing, so that all that is measured is around it; the three kinds alternate. Time of the
clock, as part of it is waiting for the disk, and CPU time of the server's process. With a small picture, and with one
of half a megabyte.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from benchmarks.figures import figure, table, write

TESTS = str(Path(__file__).parent.parent / "tests")
sys.path.insert(0, TESTS)

from support.quick import NOISE  # noqa: E402
from support.quick import Server as QuickServer  # noqa: E402
from support.serving import Server  # noqa: E402

REPEATS = 100
PROMPTS = {"8x8": "a cat", "512x512, 0.5 MB": NOISE}


def headers(kind: str) -> dict[str, str]:
    key = {"idempotency-key": uuid.uuid4().hex}
    return {"plain": {}, "keyed": key, "async": {"prefer": "respond-async"}}[kind]


def measure(server: Server, prompt: str) -> dict[str, tuple[list[float], list[float]]]:
    """Kind → milliseconds of each request: of the clock, and of the server's CPU time."""
    process = psutil.Process(server.pid)
    body = {"prompt": prompt, "model": "m", "response_format": "b64_json"}
    taken: dict[str, tuple[list[float], list[float]]] = {kind: ([], []) for kind in ("plain", "keyed", "async")}
    for turn in range(REPEATS + 5):
        for kind, (clock, cpu) in taken.items():
            began, used = time.perf_counter(), sum(process.cpu_times()[:2])
            answer = server.client.post("/v1/images/generations", json=body, headers=headers(kind))
            assert answer.status_code in (200, 202), answer.text
            seconds = time.perf_counter() - began
            while kind == "async" and server.client.get(answer.headers["location"]).json()["ended"] is None:
                pass
            if turn >= 5:  # the first ones make tables and threads
                clock.append(1000 * seconds)
                cpu.append(1000 * (sum(process.cpu_times()[:2]) - used))
    return taken


def main() -> None:
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        models.mkdir()
        (models / "m.yaml").write_text("name: m\nparameters:\n  model: some/one\n")
        with QuickServer(
            models, Path(folder) / "data", env={"PYTHONPATH": os.pathsep.join([TESTS, *sys.path])}
        ) as server:
            for name, prompt in PROMPTS.items():
                taken = measure(server, prompt)
                figures[name] = {kind: figure(clock) for kind, (clock, _) in taken.items()}
                figures[name]["CPU time"] = {kind: round(sum(cpu) / len(cpu), 2) for kind, (_, cpu) in taken.items()}
    rows = [
        [name, *(each[kind] for kind in ("plain", "keyed", "async")), each["CPU time"]]
        for name, each in figures.items()
    ]
    print(table(["milliseconds", "plain", "keyed", "async (to its 202)", "CPU time, async to its end"], rows))
    write("jobs", "cpu", figures)


if __name__ == "__main__":
    main()
