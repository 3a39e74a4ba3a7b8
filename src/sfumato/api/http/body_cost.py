"""What a body would cost to build, counted over its bytes before anything is built of them.

Pictures are long and cheap: one text each, without escapes. Whatever else is in a body is prompts and fields,
which are few and short; a body that has many or long ones is refused. All counting is done by `bytes` methods
that walk in C, and what Python does for each string or field is bounded by the caps.
"""

from __future__ import annotations

from sfumato.errors import InvalidRequest, RequestTooLarge

MAX_STRINGS = 20_000
"""Keys and texts of a JSON body."""
MAX_VALUES = 20_000
"""Of its lists and objects, in all."""
MAX_QUOTES = 100_000
"""That stand in its texts, behind a backslash."""
MAX_STRUCTURE = 2**18
"""Bytes outside of its texts: brackets, numbers, blanks."""
MAX_DIGITS = 400
"""Of a number: longer than that of any double."""
MAX_FIELDS = 200
"""Of a form."""

SMALL = 4096
"""Bytes of a text that need not be looked at: it is no picture."""
STRANGERS = 64
"""Bytes that a picture's text may have besides those of base64, such as the head of a data: URI."""

_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=-_\r\n"
_DIGITS = bytes(code if chr(code).isdigit() and code < 128 else 32 for code in range(256))
"""Everything else is a blank."""


def is_picture(text: bytes | bytearray) -> bool:
    """Whether a text can be a picture in base64."""
    if len(text) <= SMALL:
        return False
    plain = text.replace(b"\\/", b"/").replace(b"%2B", b"+").replace(b"%2F", b"/").replace(b"%3D", b"=")
    return len(plain.translate(None, _BASE64)) <= STRANGERS


def check_json(body: bytes | bytearray, most_text: int) -> None:
    """Raises InvalidRequest (RequestTooLarge for bytes) if it has too much that is no picture."""
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
                f"the body has more than {MAX_STRUCTURE} bytes beside its texts: numbers, brackets, blanks"
            )
        if strings > MAX_STRINGS:
            raise too_many("texts", MAX_STRINGS)
        end = _end(body, start + 1)
        text += 0 if is_picture(body[start + 1 : end]) else end - start
        if text > most_text:
            raise too_much_text(most_text)
        position = end + 1
    rest = b"".join(outside)
    if rest.count(b",") + rest.count(b"[") + rest.count(b"{") > MAX_VALUES:
        raise too_many("values", MAX_VALUES)
    if max(map(len, rest.translate(_DIGITS).split()), default=0) > MAX_DIGITS:
        raise InvalidRequest(f"the body has a number of more than {MAX_DIGITS} digits")


def check_urlencoded(body: bytes | bytearray, most_text: int) -> None:
    """The same for a form."""
    if body.count(b"&") >= MAX_FIELDS:
        raise too_many("fields", MAX_FIELDS)
    if body.count(b"%") > most_text // 3:  # the work of reading one is its escapes
        raise too_much_text(most_text)
    if sum(len(field) for field in body.split(b"&") if not is_picture(field.partition(b"=")[2])) > most_text:
        raise too_much_text(most_text)


def too_many(things: str, most: int) -> InvalidRequest:
    return InvalidRequest(f"the body has more than {most} {things}; a request to draw has a few dozen")


def too_much_text(most: int) -> RequestTooLarge:
    return RequestTooLarge(
        f"the request has more than {most / 2**20:g} MiB that are no pictures; send less, or raise the setting "
        "max_text_mb"
    )


def _end(body: bytes | bytearray, start: int) -> int:
    """Where the text ends that begins at `start`: at a quote with an even number of backslashes before it."""
    position = start
    while (quote := body.find(b'"', position)) >= 0:
        before = body[position:quote]
        if (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:
            return quote
        position = quote + 1
    return len(body)
