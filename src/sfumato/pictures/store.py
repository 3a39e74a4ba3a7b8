"""Pictures on disk. A file appears under its name whole or not at all, and leaves when it is old."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path

from sfumato.errors import StorageError
from sfumato.settings import Settings

log = logging.getLogger(__name__)

MEDIA_TYPES = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}
"""What is kept, by the extension of its name."""

LOW_WATER = 0.95
"""Of the limit is what stays when it was passed, so that not every picture has the whole folder counted."""

STRAY_S = 3600
"""A file that was not finished after so many seconds never will be."""

RANDOM_DIGITS = 26
"""Of a name, hexadecimal digits that are chance; the six behind them say whose it is, to who knows the owners."""

_NAME = re.compile(rf"[0-9a-f]{{32}}\.({'|'.join(MEDIA_TYPES)})")
_PART = re.compile(r"sfumato-\w+\.part")


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """A picture as it is sent."""

    data: bytes
    media_type: str


class Store:
    """A folder of pictures, each under a random name that cannot be guessed.

    `max_age_s` and `max_bytes` (of all together) are kept by `expire`, and by `put` for the bytes; 0 is no
    limit. Whatever else lies in the folder is left alone.
    """

    def __init__(self, folder: Path, *, max_age_s: float = 0, max_bytes: int = 0) -> None:
        self.folder = folder
        self._max_age_s = max_age_s
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._bytes: int | None = None
        """Of all pictures, as far as this process knows; None before it looked."""

    @classmethod
    def of(cls, settings: Settings) -> Store:
        """The folder and limits that the settings say."""
        return cls(
            settings.data / "generated-images",
            max_age_s=settings.outputs_max_age_h * 3600,
            max_bytes=settings.outputs_max_mb * 2**20,
        )

    def put(self, data: bytes, extension: str = "png", *, owner: str = "") -> str:
        """Keep a picture (`extension` is one of `MEDIA_TYPES`); returns its name, which `owner_of` reads.

        Raises StorageError when it cannot be written. Blocks.
        """
        assert extension in MEDIA_TYPES, extension
        name = self.named(owner, extension)
        temporary: str | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix="sfumato-", suffix=".part")
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(self.folder / name)
        except OSError as error:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            raise StorageError(
                f"the picture was drawn but could not be written to {self.folder}: {error.strerror}. "
                "Free space there, mend its permissions, or ask for response_format b64_json."
            ) from error
        if self._max_bytes and self._grew(len(data)) > self._max_bytes:
            self.expire()
        return name

    @staticmethod
    def named(owner: str, extension: str) -> str:
        """A new name."""
        random = secrets.token_hex(RANDOM_DIGITS // 2)
        return f"{random}{_mark(random, owner)}.{extension}"

    def get(self, name: str) -> StoredPicture | None:
        """The picture of that name, whole, or None when there is none (any other name included). Blocks."""
        match = _NAME.fullmatch(name)
        if not match:
            return None
        try:
            data = (self.folder / name).read_bytes()
        except OSError:
            return None  # it has just expired, or somebody deleted it
        return StoredPicture(data, MEDIA_TYPES[match[1]]) if data else None

    def has(self, name: str) -> bool:
        """Whether there is a picture of that name. Blocks."""
        return bool(_NAME.fullmatch(name)) and (self.folder / name).is_file()

    def names(self) -> dict[str, float]:
        """Every picture that there is, with when it was written, in seconds since 1970. Blocks."""
        return {path.name: modified for modified, path, _ in self._pictures(time.time())}

    def delete(self, name: str) -> None:
        """The picture of that name, if there is one. Raises StorageError when it cannot be deleted. Blocks."""
        if not _NAME.fullmatch(name):
            return
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{name} cannot be deleted from {self.folder}: {error.strerror}") from error
        with self._lock:
            self._bytes = None  # counted anew when it matters

    def expire(self, now: float | None = None, *, spare: Container[str] = ()) -> int:
        """Delete what is too old, then the oldest while all are too large; returns how many pictures went.

        The newest stays, however large; names in `spare` do not grow too old. `now` is in seconds since 1970. Blocks.
        """
        now = time.time() if now is None else now
        with self._lock:
            found = self._pictures(now)
            total = sum(size for _, _, size in found)
            room = self._max_bytes * LOW_WATER if self._max_bytes and total > self._max_bytes else total
            gone = 0
            for index, (modified, path, size) in enumerate(found):
                old = self._max_age_s and now - modified > self._max_age_s and path.name not in spare
                over = total > room and index < len(found) - 1
                if (old or over) and _delete(path):
                    total -= size
                    gone += 1
            self._bytes = total
        if gone:
            log.info("%d pictures expired; %.0f MiB are kept", gone, total / 2**20)
        return gone

    def _grew(self, size: int) -> int:
        """All bytes after a picture of `size` came; where nobody has counted yet, more than any limit."""
        with self._lock:
            if self._bytes is None:
                return self._max_bytes + 1
            self._bytes += size
            return self._bytes

    def _pictures(self, now: float) -> list[tuple[float, Path, int]]:
        """Time, path and size of each picture, oldest first. Unfinished files of long ago go."""
        found = []
        for entry in _scan(self.folder):
            try:
                about = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if _NAME.fullmatch(entry.name):
                found.append((about.st_mtime, Path(entry.path), about.st_size))
            elif _PART.fullmatch(entry.name) and now - about.st_mtime > STRAY_S:
                _delete(Path(entry.path))
        return sorted(found)


def owner_of(name: str, owners: Iterable[str]) -> str | None:
    """The one of `owners` that the picture of this name was put for; None when it is none of them."""
    random, mark = name[:RANDOM_DIGITS], name[RANDOM_DIGITS : RANDOM_DIGITS + 6]
    return next((owner for owner in owners if _mark(random, owner) == mark), None)


def _mark(random: str, owner: str) -> str:
    return hashlib.sha256(f"{random} {owner}".encode()).hexdigest()[:6]


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if entry.is_file(follow_symlinks=False)]
    except OSError:
        return []  # there is none yet; `put` says what is wrong with it


def _delete(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be deleted: %s", path, error.strerror)
        return False
    return True
