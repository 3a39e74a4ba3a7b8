"""Pictures on disk. A file appears under its name complete or not at all, and is deleted when it is old."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sfumato import disk
from sfumato.errors import StorageError
from sfumato.formats import FORMATS

log = logging.getLogger(__name__)

MEDIA_TYPES = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}
"""Media types of stored pictures, by extension."""

STORED = {**{each.name: each.media_type for each in FORMATS.values()}, **MEDIA_TYPES}
"""The same of all stored files: pictures, clips and sounds."""

LOW_WATER = 0.95
"""Fraction of the limit to shrink to once it is exceeded, so that not every new picture rescans the folder."""

ABANDONED_S = 3600
"""Seconds after which an unfinished file is considered abandoned."""

UNKNOWN = math.inf
"""Time of a picture of which the file system does not say when it was written. It is never expired."""

RANDOM_DIGITS = 26
"""Random hexadecimal digits of a name; the six after them identify the owner, to those who know the owners."""

_NAME = re.compile(rf"[0-9a-f]{{32}}\.({'|'.join(STORED)})")
_PART = re.compile(r"sfumato-\w+\.part")


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """A stored picture, ready to be sent."""

    data: bytes
    media_type: str


class Store:
    """A folder of pictures, each under a random name that cannot be guessed.

    `max_age_s` and `max_bytes` (total) are enforced by `expire`, and `max_bytes` also by `put`; 0 is no
    limit. Other files in the folder are left alone.
    """

    near = True
    """Whether `has` is quick enough to be asked of each picture of a page."""

    def __init__(self, folder: Path, *, max_age_s: float = 0, max_bytes: int = 0) -> None:
        self.folder = folder
        self._max_age_s = max_age_s
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        """Of `_bytes`. Never held while files are touched: they may be behind a network."""
        self._expiring = threading.Lock()
        """Held by the one that expires pictures; `put` never waits for it."""
        self._synced = False
        """Whether the folder itself survives a power cut."""
        self._bytes: int | None = None
        """Total of all pictures, as far as this process knows; None before the first scan. During a scan, of those that
        are put meanwhile: some of them may be counted twice."""

    def put(self, data: bytes, extension: str = "png", *, owner: str = "", random: str = "") -> str:
        """Store a picture (`extension` is one of `STORED`); returns its name, which `owner_of` understands.

        `random`: `RANDOM_DIGITS` digits for the name of a stored request's picture. Drawn again it replaces the first,
        and it survives a power cut, as its answer does. Empty: new digits, of any other picture. Raises StorageError if
        it cannot be written. Blocks.
        """
        assert extension in STORED, extension
        name = self.new_name(owner, extension, random)
        self._write(name, data, lasting=bool(random))
        if self._max_bytes and self._total_after(len(data)) > self._max_bytes:
            self._make_room()
        return name

    def _sync_names(self) -> None:
        (disk.sync_names if self._synced else disk.sync_folder)(self.folder)
        self._synced = True

    @staticmethod
    def new_name(owner: str, extension: str, random: str = "") -> str:
        """A new name."""
        random = random or secrets.token_hex(RANDOM_DIGITS // 2)
        return f"{random}{_mark(random, owner)}.{extension}"

    @staticmethod
    def is_name(text: str) -> bool:
        """Whether a picture could have this name."""
        return bool(_NAME.fullmatch(text))

    def get(self, name: str) -> StoredPicture | None:
        """The picture of that name, or None if there is none or the name is invalid. Blocks."""
        match = _NAME.fullmatch(name)
        data = self._read(name) if match else None
        return StoredPicture(data, STORED[match[1]]) if match and data else None

    def has(self, name: str) -> bool:
        """Whether a picture of that name exists. Blocks."""
        return bool(_NAME.fullmatch(name)) and self._exists(name)

    def open(self, name: str) -> BinaryIO:
        """To read a file's header from. Raises OSError if it is not there. Blocks."""
        return (self.folder / name).open("rb")

    def names(self) -> dict[str, float]:
        """Every picture and when it was written, in seconds since 1970; now, if that is unknown. Blocks."""
        now = time.time()
        return {name: now if modified == UNKNOWN else modified for modified, name, _ in self._pictures(now)}

    def delete(self, name: str) -> None:
        """Delete the picture of that name, if there is one. Raises StorageError if that fails. Blocks."""
        if not _NAME.fullmatch(name):
            return
        self._remove(name)
        with self._lock:
            self._bytes = None  # rescanned when needed

    def expire(self, now: float | None = None, *, spare: Container[str] = ()) -> int:
        """Delete pictures that are too old, then the oldest until the total fits; returns how many were deleted.

        The newest always stays; names in `spare` do not expire by age. `now` is in seconds since 1970. Blocks.
        """
        with self._expiring:
            return self._expire_all(time.time() if now is None else now, spare)

    def _make_room(self) -> None:
        """`expire`, unless that is being done. Nobody is told of an error: the picture itself was written."""
        if not self._expiring.acquire(blocking=False):
            return
        try:
            self._expire_all(time.time(), ())
        except StorageError as error:
            log.warning("the oldest pictures could not be deleted: %s", error.message)
        finally:
            self._expiring.release()

    def _expire_all(self, now: float, spare: Container[str]) -> int:
        with self._lock:
            self._bytes = 0
        try:
            pictures = self._pictures(now)
        except StorageError:
            with self._lock:
                self._bytes = None
            raise
        total = sum(size for _, _, size in pictures)
        room = self._max_bytes * LOW_WATER if self._max_bytes and total > self._max_bytes else total
        deleted = 0
        for index, (modified, name, size) in enumerate(pictures):
            old = self._max_age_s and now - modified > self._max_age_s and name not in spare
            over = total > room and index < len(pictures) - 1 and modified < UNKNOWN
            if (old or over) and self._expire(name):
                total -= size
                deleted += 1
        with self._lock:
            if self._bytes is not None:  # `delete` was not called meanwhile
                self._bytes += total
        if deleted:
            log.info("%d pictures expired; %.0f MiB are kept", deleted, total / 2**20)
        return deleted

    def _total_after(self, size: int) -> int:
        """Total bytes after adding a picture of `size`; before the first scan, more than any limit."""
        with self._lock:
            if self._bytes is None:
                return self._max_bytes + 1
            self._bytes += size
            return self._bytes

    def _expire(self, name: str) -> bool:
        """Whether it could be deleted."""
        try:
            self._remove(name)
        except StorageError as error:
            log.warning("%s", error.message)
            return False
        return True

    # The files themselves; `object_store` has them elsewhere. All of them block.

    def _write(self, name: str, data: bytes, *, lasting: bool) -> None:
        """Whole or not at all. `lasting`: it survives a power cut. Raises StorageError."""
        temporary: str | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix="sfumato-", suffix=".part")
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                if lasting:
                    file.flush()
                    os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(self.folder / name)
            if lasting:
                self._sync_names()
        except OSError as error:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            raise StorageError(
                f"it was drawn, but its file could not be written to {self.folder}: {error.strerror}. "
                "Free space there, or fix its permissions; a picture may be requested with response_format b64_json."
            ) from error

    def _read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except OSError:
            return None  # it has just expired, or was deleted by hand

    def _exists(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def _remove(self, name: str) -> None:
        """Raises StorageError."""
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{name} cannot be deleted from {self.folder}: {error.strerror}") from error

    def _pictures(self, now: float) -> list[tuple[float, str, int]]:
        """Time (or `UNKNOWN`), name and size of each picture, oldest first. Deletes abandoned unfinished files."""
        pictures = []
        for entry in _scan(self.folder):
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if _NAME.fullmatch(entry.name):
                pictures.append((status.st_mtime, entry.name, status.st_size))
            elif _PART.fullmatch(entry.name) and now - status.st_mtime > ABANDONED_S:
                self._expire(entry.name)
        return sorted(pictures)


def owner_of(name: str, owners: Iterable[str]) -> str | None:
    """The one of `owners` that owns the picture of this name; None if it is none of them."""
    random, mark = name[:RANDOM_DIGITS], name[RANDOM_DIGITS : RANDOM_DIGITS + 6]
    return next((owner for owner in owners if _mark(random, owner) == mark), None)


def _mark(random: str, owner: str) -> str:
    return hashlib.sha256(f"{random} {owner}".encode()).hexdigest()[:6]


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if entry.is_file(follow_symlinks=False)]
    except OSError:
        return []  # the folder does not exist yet; `put` reports any problem with it
