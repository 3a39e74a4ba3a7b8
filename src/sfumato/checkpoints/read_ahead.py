"""A model's weights come into the system's page cache while the worker is still importing its libraries.

Weights are mapped, not copied, so that loading reads them from there. Where the system cannot be asked to read ahead
(os.posix_fadvise, Unix but not macOS), nothing is done.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from sfumato.checkpoints import stored, variants
from sfumato.config import ModelConfig

log = logging.getLogger(__name__)

CHUNK = 64 * 2**20
"""Bytes that the system is asked for at once: Linux shortens what is larger than a device's limit."""


def begin(config: ModelConfig) -> threading.Thread:
    """Read a model's weights ahead, in a thread of its own."""
    thread = threading.Thread(target=_read, args=(config,), name="sfumato-read-ahead", daemon=True)
    thread.start()
    return thread


def _read(config: ModelConfig) -> None:
    try:
        files = [file for place in stored.of(config).files for file in _loaded_from(place, config)]
        sizes = {file: file.stat().st_size for file in files}
        if sum(sizes.values()) > psutil.virtual_memory().available:
            return  # the end of it would push its beginning out
        for file, size in sizes.items():
            _ask(file, size)
    except Exception as error:  # whatever is wrong with the files, loading says it better
        log.debug("%s: its weights are not read ahead: %s", config.name, error)


def _loaded_from(place: Path, config: ModelConfig) -> Iterator[Path]:
    """The weight files of a place that are loaded: of one variant, and of safetensors and pickles the former."""
    if place.is_file():
        yield place
        return
    names = {path: f"{path.parent.name}/{path.name}" for path in place.glob("*/*") if stored.is_weight(path)}
    variant = variants.pick(names.values(), variants.preferred(config, config.dtype or "fp32"))
    for part in sorted({path.parent for path in names}):
        weights = [path for path in names if path.parent == part]
        weights = [path for path in weights if path.suffix == ".safetensors"] or weights
        chosen = [path for path in weights if variants.of(names[path]) == variant]
        yield from chosen or [path for path in weights if variants.of(names[path]) is None]


def _ask(file: Path, size: int) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    with file.open("rb") as opened:
        for start in range(0, size, CHUNK):
            os.posix_fadvise(opened.fileno(), start, min(CHUNK, size - start), os.POSIX_FADV_WILLNEED)
