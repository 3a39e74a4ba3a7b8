"""A server whose pictures show their seed, that waits at a gate, and that dies at a given point of a job's life.

`python -m support.seeded SETTINGS`. Nothing of it is in the product: the points are set from outside.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import io
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, NoReturn

import sqlalchemy as sql
from PIL import Image

from sfumato.api.batches.store import BatchStore
from sfumato.api.jobs.store import JobStore
from sfumato.commands import serve
from sfumato.config import ModelConfig
from sfumato.core import Done, Event, Generation, Step
from sfumato.process import supervisor
from sfumato.settings import Settings
from support import quick

POINTS = ("accepting", "accepted", "drawing", "drawn", "ending", "ended")
"""Before the commit that accepts a job; after it; after the first step; before the answer is stored; before the commit
that stores it; after it, before the client has the answer."""

GATED = "gated"
"""The prompt of a picture that is done once the gate is open."""

MODEL = "name: m\nparameters:\n  model: some/one\ndiffusers:\n  enable_parameters: image,num_inference_steps\n"


def colour(seed: int) -> tuple[int, int, int]:
    return seed >> 16 & 255, seed >> 8 & 255, seed & 255


def colour_of(b64_json: str) -> Any:
    return Image.open(io.BytesIO(base64.b64decode(b64_json))).getpixel((0, 0))


class Server(quick.Server):
    """As `quick.Server`. `die_at`: one of `POINTS`; it dies there once."""

    def __init__(self, folder: Path, *flags: str, die_at: str = "", data: Path | None = None) -> None:
        (folder / "models").mkdir(exist_ok=True)
        (folder / "models" / "m.yaml").write_text(MODEL)
        self.folder = folder
        super().__init__(
            folder / "models",
            data or folder / "data",
            *flags,
            env={"SEEDED_FOLDER": str(folder), "SEEDED_DIE_AT": die_at},
        )
        self._command[2] = "support.seeded"

    def open_gate(self) -> None:
        (self.folder / "gate").touch()

    def close_gate(self) -> None:
        (self.folder / "gate").unlink(missing_ok=True)

    def drawn(self) -> list[tuple[str, int]]:
        """Prompt and seed of every picture that was begun, over all lives."""
        file = self.folder / "drawn"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(line.rpartition(" ")[0], int(line.rpartition(" ")[2])) for line in lines]

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()


class Seeded(quick.Square):
    async def submit(self, config: ModelConfig, generation: Generation) -> AsyncGenerator[Event, None]:
        folder = Path(os.environ["SEEDED_FOLDER"])
        with (folder / "drawn").open("a") as file:
            file.write(f"{generation.prompt} {generation.seed}\n")
        yield Step(1, 2)
        if os.environ["SEEDED_DIE_AT"] == "drawing":
            die()
        if generation.sampling.steps == quick.FOR_EVER:
            await asyncio.Event().wait()
        while generation.prompt.startswith(GATED) and not (folder / "gate").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # another process opens it
        file = io.BytesIO()
        Image.new("RGB", (8, 8), colour(generation.seed)).save(file, "PNG")
        yield Done(file.getvalue(), quick._recipe(config, generation))


def die(*_: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def dying(call: Callable[..., Any], point: str, before: str, at_commit: str, after: str) -> Callable[..., Any]:
    def called(store: Any, *args: Any) -> Any:
        if point and point == before:
            die()
        if point == at_commit:
            sql.event.listen(store.engine, "commit", die)
        result = call(store, *args)
        if point == after:
            die()
        return result

    return called


def main(given: dict[str, Any]) -> None:
    supervisor.Supervisor = Seeded  # type: ignore[assignment, misc]
    point = os.environ["SEEDED_DIE_AT"]
    JobStore.accept = dying(JobStore.accept, point, "", "accepting", "accepted")  # type: ignore[method-assign]
    JobStore.end = dying(JobStore.end, point, "drawn", "ending", "ended")  # type: ignore[method-assign]
    BatchStore.create = dying(BatchStore.create, point, "", "never", "batch accepted")  # type: ignore[method-assign]
    BatchStore.end_line = dying(BatchStore.end_line, point, "", "never", "batch answered")  # type: ignore[method-assign]
    BatchStore.finish = dying(BatchStore.finish, point, "", "never", "batch ended")  # type: ignore[method-assign]
    serve.serve(Settings.load(given))


if __name__ == "__main__":
    main(ast.literal_eval(sys.argv[1]))
