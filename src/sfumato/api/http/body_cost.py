"""Estimate the cost of parsing a body from its bytes, before parsing it.

Pictures are long and cheap: one string each, without escapes. Everything else in a body is prompts and fields,
which are few and short; a body with many or long ones is refused. Counting uses `bytes` methods implemented
in C, and Python's work per string or field is bounded by the limits below.
"""

from __future__ import annotations

from sfumato.errors import InvalidRequest, RequestTooLarge

MAX_STRINGS = 20_000
"""Maximum strings (keys included) of a JSON body."""
MAX_VALUES = 20_000
"""Maximum items of all its lists and objects."""
MAX_QUOTES = 100_000
"""Maximum escaped quotes in its strings."""
MAX_STRUCTURE = 2**18
"""Maximum bytes outside its strings: brackets, numbers, spaces."""
MAX_DIGITS = 400
"""Maximum digits of a number: more than any double has."""
MAX_FIELDS = 200
"""Maximum fields of a form."""

SMALL = 4096
"""Strings up to this many bytes are not pictures and need no check."""
MAX_NON_BASE64 = 64
"""Maximum non-base64 bytes in a picture's string, such as the prefix of a data: URI."""

_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=-_\r\n"
_DIGITS = bytes(code if chr(code).isdigit() and code < 128 else 32 for code in range(256))
"""Translation table: digits stay, everything else becomes a space."""


def is_picture(text: bytes | bytearray) -> bool:
    """Whether a string can be a picture in base64."""
    if len(text) <= SMALL:
        return False
    plain = text.replace(b"\\/", b"/").replace(b"%2B", b"+").replace(b"%2F", b"/").replace(b"%3D", b"=")
    return len(plain.translate(None, _BASE64)) <= MAX_NON_BASE64


def check_json(body: bytes | bytearray, max_text: int) -> None:
    """Raises InvalidRequest (RequestTooLarge for bytes) if there is too much besides pictures."""
    quotes, within = body.count(b'"'), body.count(b'\\"')
    if quotes - within > 2 * MAX_STRINGS or within > MAX_QUOTES:
        raise too_many("texts", MAX_STRINGS)
    outside: list[bytes | bytearray] = []
    text = structure = position = 0
    strings = 0
    while position < len(body):
        start = body.find(b'"', position)
        start = len(body) if start < 0 else start
        outside.append(body[position:start])
        structure += start - position
        strings += 1
        if structure > MAX_STRUCTURE:
            raise RequestTooLarge(
                f"the body has more than {MAX_STRUCTURE} bytes outside its strings: numbers, brackets, spaces"
            )
        if strings > MAX_STRINGS:
            raise too_many("texts", MAX_STRINGS)
        end = _end(body, start + 1)
        text += 0 if is_picture(body[start + 1 : end]) else end - start
        if text > max_text:
            raise too_much_text(max_text)
        position = end + 1
    rest = b"".join(outside)
    if rest.count(b",") + rest.count(b"[") + rest.count(b"{") > MAX_VALUES:
        raise too_many("values", MAX_VALUES)
    if max(map(len, rest.translate(_DIGITS).split()), default=0) > MAX_DIGITS:
        raise InvalidRequest(f"the body has a number with more than {MAX_DIGITS} digits")


def check_urlencoded(body: bytes | bytearray, max_text: int) -> None:
    """The same for a form."""
    if body.count(b"&") >= MAX_FIELDS:
        raise too_many("fields", MAX_FIELDS)
    if body.count(b"%") > max_text // 3:  # the cost of decoding is in its escapes
        raise too_much_text(max_text)
    if sum(len(field) for field in body.split(b"&") if not is_picture(field.partition(b"=")[2])) > max_text:
        raise too_much_text(max_text)


def too_many(items: str, limit: int) -> InvalidRequest:
    return InvalidRequest(f"the body has more than {limit} {items}; a drawing request has a few dozen")


def too_much_text(limit: int) -> RequestTooLarge:
    return RequestTooLarge(
        f"the request has more than {limit / 2**20:g} MiB besides pictures; send less, or raise the setting max_text_mb"
    )


def _end(body: bytes | bytearray, start: int) -> int:
    """End of the string that begins at `start`: a quote preceded by an even number of backslashes."""
    position = start
    while (quote := body.find(b'"', position)) >= 0:
        before = body[position:quote]
        if (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:
            return quote
        position = quote + 1
    return len(body)
