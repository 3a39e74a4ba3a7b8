"""Pictures behind a URL: in S3, or wherever else fsspec has a file system for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec

from sfumato.errors import StorageError
from sfumato.pictures.store import Store

TIMES = ("LastModified", "mtime", "updated", "last_modified", "created")
"""What file systems call the time of a file."""


class ObjectStore(Store):
    """As a folder's store. An object is there as a whole or not at all, as file systems of objects have it."""

    def __init__(self, url: str, *, max_age_s: float = 0, max_bytes: int = 0) -> None:
        """Raises ValueError for a URL without a file system."""
        super().__init__(Path(url), max_age_s=max_age_s, max_bytes=max_bytes)
        self._url = url
        try:
            # Other servers write there, too: nothing that was listed may be taken for what there is.
            self._files, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ValueError(f"outputs_url={url!r}: {error}") from None

    def open(self, name: str) -> BytesIO:
        return BytesIO(self._read(name) or b"")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _write(self, name: str, data: bytes, *, lasting: bool) -> None:
        with self._errors(f"the picture was drawn but could not be written to {self._url}"):
            self._files.pipe_file(self._path(name), data)

    def _read(self, name: str) -> bytes | None:
        with self._errors(f"{name} cannot be read from {self._url}"):
            try:
                return bytes(self._files.cat_file(self._path(name)))
            except FileNotFoundError:
                return None  # it has just expired, or was deleted by hand

    def _exists(self, name: str) -> bool:
        with self._errors(f"{self._url} cannot be asked for {name}"):
            return bool(self._files.exists(self._path(name)))

    def _remove(self, name: str) -> None:
        with self._errors(f"{name} cannot be deleted from {self._url}"), suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def _pictures(self, now: float) -> list[tuple[float, str, int]]:
        with self._errors(f"{self._url} cannot be listed"):
            try:
                entries = self._files.ls(self._root, detail=True)
            except FileNotFoundError:
                return []  # nothing is there yet
        named = [(entry["name"].rpartition("/")[2], entry) for entry in entries]
        return sorted((_time(entry), name, entry["size"]) for name, entry in named if self.is_name(name))

    @contextmanager
    def _errors(self, told: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each file system has errors of its own, and those of its network
            raise StorageError(f"{told}: {error or type(error).__name__} (the setting outputs_url)") from error


def _time(entry: Mapping[str, Any]) -> float:
    """In seconds since 1970."""
    value = next((entry[key] for key in TIMES if key in entry), 0.0)
    return value.timestamp() if isinstance(value, datetime) else float(value)
