"""Idle models of an accelerator wait in main memory if there is room, and come back without reading a disk.

What moves are tensors. One that two models have in common moves for both: it is on the device while any model there
uses it, and never in memory twice.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection

import psutil  # type: ignore[import-untyped]
import torch

from sfumato.models import footprint
from sfumato.models.footprint import Block, Needs
from sfumato.models.load import Loaded
from sfumato.models.sharing import is_plain
from sfumato.residency.budget import capacity

log = logging.getLogger(__name__)

RESERVE = 0.1
"""The part of main memory that stays free if no size is set."""


def is_beside(device: str) -> bool:
    """Whether a device has memory of its own, beside main memory."""
    return not device.startswith("cpu")


def available() -> int:
    """Bytes of main memory that this process may still take for models."""
    size = capacity("cpu")
    free = min(int(psutil.virtual_memory().available), size - int(psutil.Process().memory_info().rss))
    return free - int(RESERVE * size)


class MainMemory:
    """The models that wait there, those that came first first. Some of their tensors may be on the device.

    `take` and `give` may be called in the thread that loads, all else in the loop's.
    """

    def __init__(
        self,
        size: int = 0,
        is_beside: Callable[[str], bool] = is_beside,
        available: Callable[[], int] = available,
    ) -> None:
        """`size`: bytes that they may take together; 0: what is `available`; below: none may wait."""
        self.models: OrderedDict[str, Loaded] = OrderedDict()
        self.sizes: dict[str, int] = {}
        """Bytes of each of these models, wherever they are."""
        self._coming = 0
        """Bytes of models that were added since the last `take`."""
        self._size = size
        self._is_beside = is_beside
        self._available = available
        self._here: set[Block] = set()
        """Blocks of tensors that were moved there."""
        self._moving = threading.Lock()

    def may_hold(self, model: Loaded, size: int) -> bool:
        """Whether a model that takes `size` bytes there may wait, if others leave.

        One that is offloaded is there already when it is idle, and its hooks are for a model in use.
        """
        if self._size < 0 or not self._is_beside(model.device) or model.state.broken or model.state.offload != "none":
            return False
        if model.config.context_parallel:  # further devices would keep their copies of it
            return False
        return size <= (self._size or self._available() + self._used())

    def add(self, name: str, model: Loaded, size: int) -> None:
        """From now on an idle model waits there, of which `size` bytes are still to come."""
        self.models[name] = model
        self.sizes[name] = sum(model.blocks().values())
        self._coming += size

    def remove(self, name: str) -> None:
        """It does not wait any more."""
        self.models.pop(name, None)
        self.sizes.pop(name, None)

    def room(self) -> int:
        """Bytes for more models that wait."""
        return self._size - self._used() - self._coming if self._size else self.free()

    def free(self) -> int:
        """Bytes for a model that is read into main memory on its way to the device."""
        return self._available() - self._coming

    def _used(self) -> int:
        blocks = {block: size for model in self.models.values() for block, size in model.blocks().items()}
        return sum(size for block, size in blocks.items() if block in self._here)

    def needs(self, model: Loaded) -> Needs:
        """What a model takes on its device when it comes back; `shared`: what it has there already."""
        blocks = dict(model.blocks())
        components = {
            name: sum(blocks.pop(block, 0) for block in footprint.blocks([module]) if block in self._here)
            for name, module in model.modules().items()
        }
        return Needs(components, model.device, model.dtype, blocks)

    def to_take(self, staying: Collection[Block]) -> set[Block]:
        """Blocks of the models that wait which are still on the device, except those that stay there for others."""
        blocks = {block for model in self.models.values() for block in model.blocks()}
        return blocks - self._here - set(staying)

    def take(self, blocks: Collection[Block]) -> None:
        """Move these blocks there. A model for which that fails is broken."""
        for model in list(self.models.values()):
            try:
                self._move({block for block in model.blocks() if block in blocks}, "cpu", leaving=True)
            except Exception as error:  # whatever a module raises when it is moved
                log.exception("%s: it could not be put into main memory", model.config.name)
                model.state.broken = f"it could not be put into main memory: {error}"
        self._coming = 0

    def give(self, blocks: Collection[Block], device: str, model: Loaded | None = None) -> None:
        """Move those of these blocks that are there to the device; also in this `model`, which may not wait there."""
        kind = torch.device(device).type
        if mine := {block for block in blocks if block in self._here or block[0] != kind}:
            self._move(mine, device, leaving=False, model=model)

    def _move(self, blocks: Collection[Block], device: str, *, leaving: bool, model: Loaded | None = None) -> None:
        """All models that have one of the blocks have the moved one afterwards. `leaving`: the device."""
        with self._moving, torch.no_grad():
            models = [*self.models.values(), *([model] if model else [])]
            modules = {id(module): module for each in models for module in each.modules().values()}
            self._here &= footprint.blocks(modules.values()).keys()
            tensors: dict[tuple[object, ...], dict[int, torch.Tensor]] = {}
            for module in modules.values():
                if is_plain(module):
                    for tensor in footprint.tensors_of(module):
                        if (block := footprint.block(tensor)) in blocks:
                            view = (block, tensor.shape, tensor.stride(), tensor.dtype)
                            tensors.setdefault(view, {})[id(tensor)] = tensor
                elif not footprint.blocks([module]).keys().isdisjoint(blocks):
                    of_module = footprint.blocks([module])
                    module.to(device)
                    self._note(of_module, footprint.blocks([module]), leaving)
            for same in tensors.values():
                first = next(iter(same.values()))
                before, moved = footprint.block(first), first.detach().to(device, copy=True)
                for tensor in same.values():
                    tensor.data = moved
                self._note({before}, {footprint.block(moved)}, leaving)

    def _note(self, before: Collection[Block], after: Collection[Block], leaving: bool) -> None:
        self._here.difference_update(before)
        if leaving:
            self._here.update(after)
