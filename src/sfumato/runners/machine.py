"""What a measured time depends on, besides the module: processor, cores, and the libraries that compute."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
LIBRARIES = ("torch", "openvino")


@functools.cache
def key() -> str:
    """16 hexadecimal digits: equal on machines that compute equally fast."""
    facts = [*_processor(), str(os.cpu_count()), *(_version(name) for name in LIBRARIES)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _processor() -> list[str]:
    """Its name and its instructions."""
    try:
        text = CPUINFO.read_text()
    except OSError:
        return [platform.processor(), platform.machine()]
    return [*re.findall(r"^(?:model name|flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)[:2], platform.machine()]


def _version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {name}"
