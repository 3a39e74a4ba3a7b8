"""Whether weight files are as they were when a model was loaded of them.

On a CPU weights are not read but mapped: they change with a file that is written over, and a file that becomes shorter
ends the process that reads behind its end. So a model in memory is compared with its files before each request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from sfumato.checkpoints.stored import WEIGHTS
from sfumato.checkpoints.weight_file import stamp

Stamps: TypeAlias = Mapping[Path, tuple[int, int, int] | None]
"""Weight file → its size, time of change and inode; None: it is not there."""


def of(places: Iterable[Path]) -> Stamps:
    """Of weight files, and of those in folders."""
    files = (file for place in places for file in (sorted(place.rglob("*")) if place.is_dir() else [place]))
    return {file: stamp(file) for file in files if WEIGHTS.fullmatch(file.name)}


def changed(stamps: Stamps) -> list[Path]:
    """Those that are there and no longer as they were; what is mapped of a deleted file stays."""
    return [file for file, written in stamps.items() if stamp(file) not in (written, None)]
