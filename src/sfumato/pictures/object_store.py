"""Pictures behind a URL: in S3, or wherever else fsspec has a file system for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from sfumato.errors import StorageError
from sfumato.pictures.store import UNKNOWN, Store

log = logging.getLogger(__name__)

TIMES = ("LastModified", "mtime", "updated", "last_modified", "modified", "created")
"""What file systems call the time of a file."""


class ObjectStore(Store):
    """As a folder's store. An object is there as a whole or not at all, as file systems of objects have it."""

    near = False

    def __init__(self, url: str, *, max_age_s: float = 0, max_bytes: int = 0) -> None:
        """Raises ValueError for a URL without a file system, or one that cannot be reached at once.

        The URL may have a password: no error quotes it.
        """
        super().__init__(Path(), max_age_s=max_age_s, max_bytes=max_bytes)
        self._url = url
        try:
            # Other servers write there, too: nothing that was listed may be taken for what there is.
            self._files, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except Exception as error:  # some connect, and each has errors of its own
            raise ValueError(f"outputs_url: {_without_credentials(error, url)}") from None
        if isinstance(self._files, LocalFileSystem):
            raise ValueError(
                "outputs_url: is on this machine's disk; leave it empty, and name a folder there by the setting data"
            )

    def file(self, name: str) -> BytesIO:
        return BytesIO(self._read(name) or b"")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _write(self, name: str, data: bytes, *, lasting: bool) -> None:
        with self._errors("the picture was drawn but could not be written"):
            self._files.pipe_file(self._path(name), data)

    def _read(self, name: str) -> bytes | None:
        with self._errors(f"{name} cannot be read"):
            try:
                return bytes(self._files.cat_file(self._path(name)))
            except FileNotFoundError:
                return None  # it has just expired, or was deleted by hand

    def _exists(self, name: str) -> bool:
        with self._errors(f"it is not known whether {name} is there"):
            return bool(self._files.exists(self._path(name)))

    def _remove(self, name: str) -> None:
        with self._errors(f"{name} cannot be deleted"), suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def _pictures(self, now: float) -> list[tuple[float, str, int]]:
        with self._errors("the pictures cannot be listed"):
            try:
                entries = self._files.ls(self._root, detail=True)
            except FileNotFoundError:
                return []  # nothing is there yet
            named = [(entry["name"].rpartition("/")[2], entry) for entry in entries]
            return sorted(
                (self._time(name, entry), name, int(entry["size"])) for name, entry in named if self.is_name(name)
            )

    def _time(self, name: str, entry: Mapping[str, Any]) -> float:
        """In seconds since 1970, or `UNKNOWN`. Asks for it where the listing does not say it."""
        for key in TIMES:
            if (time := _seconds(entry.get(key))) is not None:
                return time
        try:
            time = _seconds(self._files.modified(self._path(name)))
        except (NotImplementedError, FileNotFoundError):
            time = None
        return UNKNOWN if time is None else time

    @contextmanager
    def _errors(self, told: str) -> Iterator[None]:
        """The cause is in the log only: it may quote the URL, which is the operator's."""
        try:
            yield
        except Exception as error:  # each file system has errors of its own, and those of its network
            log.warning("outputs_url: %s: %s", told, _without_credentials(error, self._url))
            raise StorageError(
                f"{told} ({type(error).__name__}; see the server's log, and the setting outputs_url)"
            ) from error


def _seconds(value: object) -> float | None:
    """Of a time in seconds since 1970, as a date or as text of one (in UTC, if it does not say); else None."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return float(value) if isinstance(value, int | float) else None


def _without_credentials(error: Exception, url: str) -> str:
    """What an error says; its type, if it says nothing."""
    credentials = url.partition("://")[2].rpartition("@")[0]
    text = str(error) or type(error).__name__
    for part in (credentials, credentials.partition(":")[2]):
        text = text.replace(part, "...") if part else text
    return text
