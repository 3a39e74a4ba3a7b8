"""A plain model with ControlNets beside it, and requests that name them, for `engines.Engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfumato.core import Control, Generation
from support import engines, nets, tiny
from support.drawing import source


def save(folder: Path, family: str = "sd") -> Path:
    """A plain model and its ControlNets."""
    tiny.save(nets.plain(family), folder / "base")
    nets.save_nets(folder, family)
    return folder


def requested(id: str, *names: str, **fields: Any) -> Generation:
    controls = tuple(Control(source(64, 64), name=name) for name in names)
    return engines.generation(id, **{"controls": controls, **fields})
