"""Parse a multipart form: fields as text, files as bytes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser

from sfumato.api.http import body_cost, content_type
from sfumato.errors import InvalidRequest, UnsupportedMedia
from sfumato.serving.planning import MAX_PICTURES

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FILES = 4 * MAX_PICTURES
MAX_HEADERS = 16
"""Maximum headers per part."""
MAX_HEADER = 2048
"""Bytes."""
MAX_BOUNDARY = 200
"""In characters; RFC 2046 allows 70."""

IDENTITY_ENCODINGS = ("", "binary", "8bit", "7bit")
"""Transfer encodings that leave the data unchanged."""

_PADDING = re.compile(rb"[ \t]{16}")
_BOUNDARY = re.compile(r"[ -~]*[!-~]")


class File(bytes):
    """The value of a part that has a file name."""

    filename: str = ""

    def __reduce__(self) -> tuple[type[bytes], tuple[bytes]]:
        return bytes, (bytes(self),)  # other processes need no name


class _Part:
    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.data = bytearray()
        self.name = ""
        self.is_file = False
        self.filename = ""
        self.codec = "utf-8"

    def value(self) -> str | bytes:
        if self.is_file:
            file = File(self.data)
            file.filename = self.filename
            return file
        try:
            return self.data.decode(self.codec)
        except UnicodeDecodeError:
            return self.data.decode("latin-1")  # sent by old browsers


def parts(body: bytes | bytearray, media: content_type.Media, max_text: int) -> list[tuple[str, str | bytes]]:
    """Name and value of each part: bytes if it has a file name. Raises InvalidRequest if the form is invalid.

    `most_text`: maximum bytes of all fields that are not pictures.
    """
    boundary = media.parameters.get("boundary", "")
    if not _BOUNDARY.fullmatch(boundary) or len(boundary) > MAX_BOUNDARY:
        raise InvalidRequest(f"content-type: the boundary {boundary[:40]!r} must have 1 to {MAX_BOUNDARY} characters")
    _check_boundaries(body, boundary.encode())
    reader = _Reader(media.codec, max_text)
    parser = MultipartParser(
        boundary.encode(), reader.callbacks(), max_header_count=MAX_HEADERS, max_header_size=MAX_HEADER
    )
    try:
        parser.write(cast("bytes", body))  # it only slices
    except FormParserError as error:
        raise InvalidRequest(f"the form cannot be read: {error}") from None
    if not reader.ended:
        raise InvalidRequest("the form ends before its last boundary")
    return reader.parts


def _check_boundaries(body: bytes | bytearray, boundary: bytes) -> None:
    """The parser's Python code runs per boundary and per space after one: there must not be millions."""
    delimiter = b"--" + boundary
    if body.count(delimiter) > body_cost.MAX_FIELDS + MAX_FILES + 1:
        raise body_cost.too_many("parts", body_cost.MAX_FIELDS + MAX_FILES)
    position = body.find(delimiter)
    while position >= 0:
        position += len(delimiter)
        if _PADDING.match(body, position):
            raise InvalidRequest("the form cannot be read: too many spaces after a boundary")
        position = body.find(delimiter, position)


class _Reader:
    """Collects the parser's events as parts."""

    def __init__(self, codec: str, max_text: int) -> None:
        self.parts: list[tuple[str, str | bytes]] = []
        self.ended = False
        self._codec = codec
        self._max_text = max_text
        self._text = 0
        self._counts = {True: 0, False: 0}
        self._part = _Part()
        self._header = bytearray()
        self._value = bytearray()

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": lambda data, start, end: self._part.data.extend(memoryview(data)[start:end]),
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._part = _Part()

    def _header_end(self) -> None:
        name = self._header.decode("latin-1").strip().lower()
        if name in self._part.headers:
            raise InvalidRequest(f"the form cannot be read: a part has the header {name[:40]!r} twice")
        self._part.headers[name] = _text(self._value).strip()
        self._header.clear()
        self._value.clear()

    def _headers_finished(self) -> None:
        part = self._part
        disposition = content_type.parse(part.headers.get("content-disposition", ""))
        names = disposition.parameters
        if disposition.type != "form-data" or "name" not in names:
            raise InvalidRequest('the form cannot be read: a part has no `Content-Disposition: form-data; name="..."`')
        part.name = names["name"]
        part.is_file = not names.keys().isdisjoint(("filename", "filename*"))
        part.filename = names.get("filename", "")
        encoding = part.headers.get("content-transfer-encoding", "").lower()
        if encoding not in IDENTITY_ENCODINGS:
            raise UnsupportedMedia(
                f"{part.name[:40]}: content-transfer-encoding {encoding[:40]!r} is not supported; send it unencoded"
            )
        kind = content_type.parse(part.headers.get("content-type", ""))
        if kind.type.startswith("multipart/"):
            raise UnsupportedMedia(f"{part.name[:40]}: nested forms are not supported; repeat the field instead")
        part.codec = kind.codec if "charset" in kind.parameters and not part.is_file else self._codec
        self._counts[part.is_file] += 1
        limit = MAX_FILES if part.is_file else body_cost.MAX_FIELDS
        if self._counts[part.is_file] > limit:
            raise body_cost.too_many("files" if part.is_file else "fields", limit)

    def _part_end(self) -> None:
        part = self._part
        if not part.is_file and not body_cost.is_picture(part.data):
            self._text += len(part.data)
            if self._text > self._max_text:
                raise body_cost.too_much_text(self._max_text)
        value = part.value()
        if part.name == "_charset_" and isinstance(value, str):  # browsers send the charset of the other fields here
            self._codec = content_type.parse(f"text/plain; charset={value}").codec
            return
        self.parts.append((part.name, value))

    def _end(self) -> None:
        self.ended = True


def _text(data: bytearray) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")
