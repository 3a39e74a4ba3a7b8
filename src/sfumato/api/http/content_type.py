"""One parser of `Content-Type` and similar headers, used by every reader of bodies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sfumato.errors import UnsupportedMedia

JSON = ("", "application/json", "text/json", "text/plain")
"""Types read as JSON, including none. `cross_site` decides whether `text/plain` is accepted at all."""
URLENCODED = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data"
BYTES = "application/octet-stream"

CODECS: Mapping[str, str] = MappingProxyType(
    {
        "utf-8": "utf-8", "utf8": "utf-8", "us-ascii": "utf-8", "ascii": "utf-8",
        "iso-8859-1": "latin-1", "latin-1": "latin-1", "latin1": "latin-1",
    }
)  # fmt: skip
"""Charset → codec. Some of Python's other codecs take quadratic time, and some raise arbitrary errors."""

_TYPE = re.compile(r"\s*([\w!#$&^.+-]*(?:/[\w!#$&^.+-]*)?)\s*")
_PARAMETER = re.compile(r';\s*(?:([\w!#$%&\'*+.^`|~-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;"]*)))?\s*')


@dataclass(frozen=True, slots=True)
class Media:
    """`type/subtype; name=value`, names in lower case."""

    type: str
    parameters: Mapping[str, str]

    @property
    def codec(self) -> str:
        """Codec of the text. Raises UnsupportedMedia for a charset that is not in `CODECS`."""
        charset = self.parameters.get("charset", "utf-8").strip().lower()
        if charset not in CODECS:
            raise UnsupportedMedia(f"content-type: the charset {charset[:40]!r} is not supported; send utf-8")
        return CODECS[charset]


def parse(header: str) -> Media:
    """Parse a header's value. Raises UnsupportedMedia if it is invalid or repeats a parameter."""
    head = _TYPE.match(header)
    assert head is not None  # it matches the empty text
    position = head.end()
    parameters: dict[str, str] = {}
    while position < len(header):
        match = _PARAMETER.match(header, position)
        if match is None:
            raise UnsupportedMedia(f"content-type: {header[:100]!r} is not `type/subtype; name=value`")
        position = match.end()
        name, quoted, plain = match.groups()
        if name is None:  # a semicolon with nothing after it
            continue
        name = name.lower()
        if name in parameters:  # some readers would take the first, others the last
            raise UnsupportedMedia(f"content-type: {name[:40]} occurs twice in {header[:100]!r}")
        parameters[name] = plain.strip() if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
    return Media(head[1].lower(), parameters)


def is_json(type: str) -> bool:
    return type in JSON or (type.startswith("application/") and type.endswith("+json"))
