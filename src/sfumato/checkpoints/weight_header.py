"""The header of a weight file: names, shapes and dtypes of its tensors, without their values.

Of a file on this disk or, with a few requests for its first bytes, of one behind a URL. Every length in it is bounded
before it is used: the file may come from anyone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
from pydantic_core import from_json

from sfumato.checkpoints import weight_file
from sfumato.config import addresses
from sfumato.errors import LoadError

MAX_BYTES = 32 * 2**20
"""A header of ten thousand tensors has one MiB; a GGUF file of a language model has its vocabulary there too."""
FIRST = 256 * 1024
"""Bytes of the first request for a remote header."""
MAX_ITEMS = 1_000_000

GGUF_MAGIC = b"GGUF"
GGUF_NUMBERS: Mapping[int, str] = MappingProxyType(
    {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
)
"""Type of a value in GGUF's metadata -> its `struct` format; 8 is text and 9 an array."""
GGUF_TYPES: Mapping[int, str] = MappingProxyType(
    {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
     12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 30: "BF16"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    shape: tuple[int, ...]
    dtype: str
    """As the format writes it: F32, BF16, F8_E4M3, I8, Q4_K ..."""


@dataclass(frozen=True, slots=True)
class Header:
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None
    """Bytes of the whole file; None: its server did not say."""


class _TooShort(Exception):
    """The header goes on behind the bytes that are here; `args[0]` is how many are needed at least."""


def of_file(path: Path) -> Header:
    """The header of a file on this disk. Raises LoadError if it has none, or one of another format."""

    def first(count: int) -> bytes:
        with path.open("rb") as file:
            return file.read(count)

    try:
        return _parsed(first, path.stat().st_size, str(path))
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror or error}", param="parameters.model") from error


def of_url(url: str, folder: Path) -> Header:
    """The header of a file behind a URL, or of what was downloaded of it. Raises DownloadError or LoadError."""
    target = weight_file.path_for(url, folder)
    if target.is_file():
        return of_file(target)
    with weight_file.as_download_errors(url, target):
        weight_file.check_online(url, target)
        sizes: list[int | None] = []

        def first(count: int) -> bytes:
            data, size = _first_bytes_again(url, count)
            sizes.append(size)
            return data

        header = _parsed(first, None, addresses.redact(url))
        return replace(header, size=sizes[-1])


def _first_bytes_again(url: str, count: int) -> tuple[bytes, int | None]:
    """`_first_bytes`, a few times if the connection breaks."""
    for _ in range(weight_file.RETRIES - 1):
        with suppress(*weight_file.BROKEN):
            return _first_bytes(url, count)
    return _first_bytes(url, count)


def _first_bytes(url: str, count: int) -> tuple[bytes, int | None]:
    """The first bytes of a remote file, also from a server that knows no ranges; and the size of the whole file."""
    headers = {"accept-encoding": "identity", "range": f"bytes=0-{count - 1}", **weight_file.authorization(url)}
    with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=weight_file.TIMEOUT_S) as response:
        response.raise_for_status()
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= count:
                break
        whole = response.headers.get("content-range", "").rpartition("/")[2]
        if response.status_code == httpx.codes.OK:
            whole = response.headers.get("content-length", "")
        return bytes(data[:count]), int(whole) if whole.isdigit() else None


def _parsed(first: Callable[[int], bytes], size: int | None, label: str) -> Header:
    """`first` gives so many bytes of the file, or all that it has."""
    count = FIRST
    while True:
        data = first(count)
        try:
            tensors, metadata, end = (_gguf if data[:4] == GGUF_MAGIC else _safetensors)(data)
            break
        except _TooShort as error:
            if error.args[0] > MAX_BYTES or len(data) < count:
                raise _invalid(label) from None
            count = max(error.args[0], 2 * count)
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
            struct.error,
            OverflowError,
        ) as error:
            raise _invalid(label) from error
    if size is not None and end > size:
        raise LoadError(
            f"{label} is cut short: it has {size:,} of {end:,} bytes. Download it again", param="parameters.model"
        )
    return Header(tensors, metadata, size)


def _invalid(label: str) -> LoadError:
    return LoadError(
        f"{label} has no header of a .safetensors or .gguf file: it is cut short, damaged or something else. Download "
        "it again",
        param="parameters.model",
    )


def _safetensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    """Tensors, metadata, and the bytes that a whole file has."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length + 8 > len(data):
        raise _TooShort(length + 8)
    entries = from_json(data[8 : 8 + length])  # as strict as safetensors: half a surrogate pair is no text
    metadata = entries.pop("__metadata__", None) or {}
    tensors = {
        name: Tensor(tuple(int(side) for side in entry["shape"]), str(entry["dtype"]))
        for name, entry in entries.items()
    }
    end = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    return tensors, {str(key): value for key, value in dict(metadata).items()}, end


def _gguf(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    reader = _Reader(data, 4)
    version, count, pairs = reader.number("<I"), reader.number("<Q"), reader.number("<Q")
    if version not in (2, 3) or count > MAX_ITEMS or pairs > MAX_ITEMS:
        raise ValueError("not a GGUF file")
    metadata = {reader.text(): reader.value(reader.number("<I")) for _ in range(pairs)}
    tensors = {}
    for _ in range(count):
        name, dimensions = reader.text(), reader.number("<I")
        if dimensions > 8:
            raise ValueError("not a tensor")
        shape = [reader.number("<Q") for _ in range(dimensions)]
        kind, _offset = reader.number("<I"), reader.number("<Q")
        # The fastest dimension stands first.
        tensors[name] = Tensor(tuple(reversed(shape)), GGUF_TYPES.get(kind, f"type {kind}"))
    return tensors, metadata, reader.position


class _Reader:
    """Reads GGUF's values one after the other."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data, self.position = data, position

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._data):
            raise _TooShort(end)
        data, self.position = self._data[self.position : end], end
        return data

    def number(self, format: str) -> Any:
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == 8:
            return self.text()
        if kind != 9:
            return self.number(GGUF_NUMBERS[kind])
        item, count = self.number("<I"), self.number("<Q")
        if depth > 2 or count > MAX_ITEMS * 8:
            raise ValueError("not an array")
        if item in GGUF_NUMBERS:  # its values are of no interest
            self.take(count * struct.calcsize(GGUF_NUMBERS[item]))
            return ()
        return [self.value(item, depth + 1) for _ in range(count)]
