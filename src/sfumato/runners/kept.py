"""The folder of graphs: for each the sizes at which it was compared, and the room that all take."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

MAX_KEPT = 18
"""Graphs in the folder, a few of each model; those that were used longest ago leave."""

ENDED_S = 24 * 3600
"""Seconds after which what a conversion has written is that of a process that ended in the middle."""

SIZES = "sizes.json"


def touch(folder: Path) -> None:
    """It is used now; others may have to leave."""
    with suppress(OSError):  # another server may be deleting
        os.utime(folder)
        written = {each: each.stat().st_mtime for each in folder.parent.iterdir() if each.is_dir()}
        graphs = [each for each in written if not each.name.startswith(".")]
        ended = [each for each in written if each not in graphs and written[each] < time.time() - ENDED_S]
        for old in (*sorted(graphs, key=written.__getitem__)[:-MAX_KEPT], *ended):
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
