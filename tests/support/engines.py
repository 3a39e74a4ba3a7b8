"""An engine's loop in the thread of a test, with one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sfumato.config import ModelConfig
from sfumato.core import Done, Generation, Step
from sfumato.engine.loop import Loop
from sfumato.engine.protocol import Answer, Cancel, Stop, Submit
from sfumato.pictures.images import decoded
from sfumato.sampling import nested
from sfumato.settings import Settings


class Engine:
    """Draws with the model `base` of a folder."""

    def __init__(self, folder: Path, *, ip_adapters: tuple[str, ...] = (), **settings: Any) -> None:
        self.sent: list[Any] = []
        self.config = ModelConfig(
            name="m", model=str(folder / "base"), folder=folder, dtype="fp32", cuda=False, ip_adapters=ip_adapters
        )
        self.loop = Loop(Settings(device="cpu", log_level="error", data=folder / "data", **settings), self.sent.append)

    def draw(self, *generations: Generation) -> dict[str, Any]:
        """The last event of each."""
        self.loop._stopping = False
        for generation in generations:
            self.loop.post(Submit(self.config, generation))
        self.loop.post(Stop())
        self.loop.run()
        return {each.id: each.event for each in self.sent if isinstance(each, Answer)}

    def events(self, id: str) -> list[Any]:
        return [each.event for each in self.sent if isinstance(each, Answer) and each.id == id]

    def cancel_at_its_first_step(self, id: str) -> None:
        original = self.sent.append

        def send(report: Any) -> None:
            original(report)
            if isinstance(report, Answer) and isinstance(report.event, Step) and report.id == id:
                self.loop._handle(Cancel(id))

        self.loop._send = send

    @property
    def in_memory(self) -> set[str]:
        """The models and parts, without their dtype and device."""
        return {name.rpartition(" (")[0] or name for name in self.loop._pool.sizes}

    def shared(self, module: str) -> int:
        """The most calls of a module that shared a forward pass."""
        return max(calls for name, calls in self.loop._batcher.counts.batch_sizes if name == module)


def pixels(event: Any) -> Any:
    assert isinstance(event, Done), event
    return np.asarray(decoded(event.file)).astype(int)


def generation(id: str, **fields: Any) -> Generation:
    values = {"id": id, "prompt": f"a cat {id}", "seed": 1, "steps": 4, "width": 64, "height": 64}
    return Generation(**nested({**values, **fields}))
