"""DDUF files: a whole diffusers repository in one uncompressed zip.

diffusers 0.42 reads them no longer, so a file is unpacked once, beside itself, and loaded from there. Its zip comes
from anyone: the index is bounded, and only entries of the format's own shape (stored, one folder deep, four kinds of
file) are read, by huggingface_hub's reader.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import DDUFEntry, read_dduf_file
from huggingface_hub.errors import DDUFError

from sfumato.checkpoints import sources
from sfumato.errors import DownloadError, LoadError, first_line

MAX_ENTRIES = 10_000
MAX_DIRECTORY = 8 * 2**20
"""Bytes of a zip's index."""
MAX_JSON = 2**20
CHUNK = 2**20

END, LOCATOR, LARGE_END = (struct.Struct(form) for form in ("<4s4H2LH", "<4sLQL", "<4sQ2H2L4Q"))
"""Records at the end of a zip: its index's place; where the record of one too large for that is; and that record."""
MAX_COMMENT = 2**16


def index_of(path: Path) -> dict[str, Any]:
    """The `model_index.json` in the file. Raises LoadError if it is not a DDUF file as the format says."""
    index: dict[str, Any] = json.loads(entries(path)[sources.INDEX].read_text())
    return index


def entries(path: Path) -> Mapping[str, DDUFEntry]:
    """Its entries by name; only the zip's index and `model_index.json` are read. Raises LoadError."""
    try:
        _check(path)
        found = read_dduf_file(path)
    except (DDUFError, zipfile.BadZipFile, zipfile.LargeZipFile, ValueError, LookupError, RecursionError, OSError,
            struct.error, NotImplementedError) as error:  # fmt: skip
        raise LoadError(
            f"{path} is not a whole DDUF file ({first_line(error)}); download it again", param="parameters.model"
        ) from error
    return found


def _check(path: Path) -> None:
    """What huggingface_hub's reader takes on trust. Raises ValueError."""
    size = path.stat().st_size
    entries, directory = _end_of(path)
    if directory > MAX_DIRECTORY or entries > MAX_ENTRIES:
        raise ValueError("its index is too large")
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        if len(set(names)) != len(names):
            raise ValueError("it has two entries of one name")
        for info in infos:
            segments = info.filename.split("/")
            if any(segment in ("", ".", "..") for segment in segments) or "\x00" in info.filename:
                raise ValueError(f"an entry is called {info.filename[:80]!r}")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
                raise ValueError(f"{info.filename[:80]} is compressed or encrypted")
            if info.header_offset + info.file_size > size:
                raise ValueError(f"{info.filename[:80]} ends behind the file")
            if info.filename == sources.INDEX and info.file_size > MAX_JSON:
                raise ValueError(f"{sources.INDEX} is too large")
        if sum(info.file_size for info in infos) > size:
            raise ValueError("its entries overlap")


def _end_of(path: Path) -> tuple[int, int]:
    """Entries and bytes of a zip's index, before `ZipFile` reads an index of any length. Raises ValueError."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - END.size - LOCATOR.size - MAX_COMMENT))
        tail = file.read()
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or at + END.size > len(tail):
            raise ValueError("it has no index")
        _, _, _, _, entries, directory, _, _ = END.unpack_from(tail, at)
        if at >= LOCATOR.size and tail[at - LOCATOR.size : at].startswith(b"PK\x06\x07"):
            file.seek(min(LOCATOR.unpack_from(tail, at - LOCATOR.size)[2], size))
            large = file.read(LARGE_END.size)
            if len(large) < LARGE_END.size:
                raise ValueError("it has no index")
            entries, directory = LARGE_END.unpack(large)[7:9]
    return entries, directory


def folder_of(path: Path) -> Path:
    """Where a file is unpacked: another file of its name has another place."""
    status = path.stat()
    return path.with_name(f".{path.name}-{status.st_size:x}-{status.st_mtime_ns:x}")


def unpacked(path: Path) -> Path:
    """The folder in diffusers' layout with what is in the file, made at its first use. Raises LoadError."""
    folder = folder_of(path)
    if (folder / sources.INDEX).is_file():
        return folder
    parts = entries(path)
    free = shutil.disk_usage(path.parent).free
    if (needed := sum(entry.length for entry in parts.values())) > free:
        raise DownloadError(
            f"{path} is unpacked beside itself, which takes {needed / 1e6:.0f} MB; {free / 1e6:.0f} MB are free there. "
            "Make room on that disk"
        )
    try:
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
            new = Path(temporary) / "new"
            with path.open("rb") as file:
                for name, entry in parts.items():
                    (new / name).parent.mkdir(parents=True, exist_ok=True)
                    file.seek(entry.offset)
                    _copy(file, new / name, entry.length)
            if not folder.exists():  # another process may have been quicker
                new.rename(folder)
    except OSError as error:
        if (folder / sources.INDEX).is_file():
            return folder
        raise DownloadError(f"{path} could not be unpacked beside itself: {error.strerror or error}") from error
    return folder


def _copy(file: Any, target: Path, length: int) -> None:
    with target.open("wb") as new:
        while length:
            chunk = file.read(min(CHUNK, length))
            if not chunk:
                raise OSError("it is cut short")
            new.write(chunk)
            length -= len(chunk)
