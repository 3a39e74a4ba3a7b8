"""An engine in this thread that draws with a plain model and the ControlNets that requests name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sfumato.config import ModelConfig
from sfumato.core import Control, Done, Generation
from sfumato.engine.loop import Loop
from sfumato.engine.protocol import Answer, Stop, Submit
from sfumato.pictures.images import decoded
from sfumato.sampling import nested
from sfumato.settings import Settings
from support import nets, tiny
from support.drawing import source


def save(folder: Path, family: str = "sd") -> Path:
    """A plain model and its ControlNets."""
    tiny.save(nets.plain(family), folder / "base")
    nets.save_nets(folder, family)
    return folder


class Engine:
    """A loop in this thread; `then` may post more at each answer."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.sent: list[Any] = []
        self.config = ModelConfig(name="m", model=str(folder / "base"), folder=folder, dtype="fp32", cuda=False)
        self.loop = Loop(Settings(device="cpu", log_level="error", data=folder / "data", **settings), self.sent.append)

    def draw(self, *generations: Generation) -> dict[str, Any]:
        """The last event of each."""
        self.loop._stopping = False
        for generation in generations:
            self.loop.post(Submit(self.config, generation))
        self.loop.post(Stop())
        self.loop.run()
        return {each.id: each.event for each in self.sent if isinstance(each, Answer)}

    @property
    def in_memory(self) -> set[str]:
        return {name.partition(" ")[0] for name in self.loop._pool.sizes}


def pixels(event: Any) -> Any:
    assert isinstance(event, Done), event
    return np.asarray(decoded(event.png)).astype(int)


def requested(id: str, *names: str, **fields: Any) -> Generation:
    controls = tuple(Control(source(64, 64), name=name) for name in names)
    values = {"id": id, "prompt": f"a cat {id}", "seed": 1, "steps": 4, "width": 64, "height": 64, "controls": controls}
    return Generation(**nested({**values, **fields}))
