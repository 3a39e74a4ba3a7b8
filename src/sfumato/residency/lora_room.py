"""Room for the LoRAs of requests, which count against the memory budget as the model does that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sfumato.models.footprint import Blocks, Needs
from sfumato.models.load import Loaded
from sfumato.residency.budget import Budget
from sfumato.residency.turns import Turns


def connect(
    name: str,
    limit: int,
    budget: Budget,
    models: Mapping[str, Loaded],
    blocks: dict[str, Blocks],
    evict_idle: Callable[[], bool],
    turns: Turns,
    turn: Callable[[], None] | None,
    wake: Callable[[], None],
) -> None:
    """Let the LoRAs of a loaded model have `limit` places, and the room that idle models can leave.

    `turn` lets others go on while a request waits for one that is read, with no other weights at a time. `wake` is
    called in the thread that reads.
    """
    device, adapters = models[name].device, models[name].state.adapters

    def make_room(more: int) -> bool:
        while not budget.fits(Needs({"lora": more}, device), blocks.values()):
            if not evict_idle():
                return False
        return True

    def measure() -> None:
        if name in models:
            blocks[name] = models[name].blocks()

    adapters.limit, adapters.make_room, adapters.changed = limit, make_room, measure
    adapters.alone, adapters.turn, adapters.wake = turns.reading, turn, wake
