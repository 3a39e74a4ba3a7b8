"""The folder of graphs: for each the sizes at which it was compared, and the room that all take."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

MAX_KEPT = 6
"""Graphs in the folder; those that were used longest ago leave."""

SIZES = "sizes.json"


def touch(folder: Path) -> None:
    """It is used now; others may have to leave."""
    os.utime(folder)
    graphs = [each for each in folder.parent.iterdir() if each.is_dir() and not each.name.startswith(".")]
    for old in sorted(graphs, key=lambda each: each.stat().st_mtime)[:-MAX_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def sizes(folder: Path) -> dict[str, bool]:
    """Shapes → whether graph and module agreed."""
    with suppress(OSError, ValueError):
        kept = json.loads((folder / SIZES).read_text())
        if isinstance(kept, dict):
            return {str(size): bool(same) for size, same in kept.items()}
    return {}


def put_sizes(folder: Path, sizes: dict[str, bool]) -> None:
    with suppress(OSError):  # they are compared again next time
        part = folder / f".{SIZES}.{os.getpid()}"
        part.write_text(json.dumps(sizes))
        part.replace(folder / SIZES)
