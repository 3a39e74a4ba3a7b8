"""The files of a folder that lists show and requests name: those with a name that is text."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from sfumato.errors import printable

log = logging.getLogger(__name__)


def below(root: Path) -> list[Path]:
    """Everything below a folder, sorted. A name that is not UTF-8 is left out and logged once: no JSON can say it."""
    return [path for path in sorted(root.rglob("*")) if _is_text(path, path.relative_to(root).as_posix())]


@functools.lru_cache(4096)
def _is_text(path: Path, name: str) -> bool:
    if name == printable(name):
        return True
    log.warning("%s is left out: its name is not UTF-8; rename it", printable(str(path)))
    return False
