"""SHA-256 of weight files, each read once: kept in a file beside the pictures, by the file's identity on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from contextlib import suppress
from pathlib import Path

_DIGEST = re.compile(r"[0-9a-f]{64}")


class ContentHashes:
    """Digests by path, size, time of change and inode. May be used in any thread."""

    def __init__(self, file: Path | None = None) -> None:
        """Keep them in `file`; None: in memory."""
        self._file = file
        self._lock = threading.Lock()
        self._digests: dict[str, str] | None = None

    def of(self, path: Path) -> str:
        """The digest of a file's content. Raises OSError."""
        real = path.resolve()
        if real.parent.name == "blobs" and _DIGEST.fullmatch(real.name):
            return real.name  # the hub's cache names large files by their digest
        key = _key(real)
        with self._lock:
            if self._digests is None:
                self._digests = self._read()
            if key not in self._digests:
                with real.open("rb") as file:
                    self._digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
                self._write(self._digests)
            return self._digests[key]

    def same(self, one: Path, other: Path) -> bool:
        """Whether two files have the same content; they are read only if their sizes agree. Raises OSError."""
        if _key(one.resolve()) == _key(other.resolve()):
            return True
        return one.stat().st_size == other.stat().st_size and self.of(one) == self.of(other)

    def _read(self) -> dict[str, str]:
        with suppress(OSError, ValueError):
            kept = json.loads(self._file.read_text()) if self._file else {}
            if isinstance(kept, dict):
                return {str(key): value for key, value in kept.items() if _DIGEST.fullmatch(str(value))}
        return {}

    def _write(self, digests: dict[str, str]) -> None:
        if self._file is None:
            return
        with suppress(OSError):  # they are computed again next time
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part = self._file.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(digests))
            part.replace(self._file)


def _key(path: Path) -> str:
    status = path.stat()
    return f"{path}:{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"
