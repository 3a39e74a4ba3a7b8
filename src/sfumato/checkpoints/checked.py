"""Check what a hub's cache has of a repository against the checksums that the hub gave, once for each file.

The cache names a large file by its SHA-256; huggingface_hub compares sizes only. What was checked is recorded beside
the file, so that later loads read nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

_SHA256 = re.compile(r"[0-9a-f]{64}")


def damaged(files: Iterable[Path]) -> list[Path]:
    """Those of a snapshot's files that do not have their checksum; files whose checksum is not known are left out."""
    return [path for path in files if path.is_symlink() and not _is_whole(path.resolve())]


def discard(files: Iterable[Path]) -> None:
    """Remove files of a snapshot from the cache, so that they are downloaded again."""
    for path in files:
        blob = path.resolve()
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)


def _is_whole(blob: Path) -> bool:
    if not _SHA256.fullmatch(blob.name) or not blob.is_file():
        return True
    status = blob.stat()
    record, version = blob.with_name(f"{blob.name}.checked"), [status.st_size, status.st_mtime_ns]
    with suppress(OSError, ValueError):
        if json.loads(record.read_bytes()) == version:
            return True
    with blob.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != blob.name:
            log.warning("%s does not have its checksum", blob)
            return False
    with suppress(OSError):  # the cache may not be writable
        record.write_text(json.dumps(version))
    return True
