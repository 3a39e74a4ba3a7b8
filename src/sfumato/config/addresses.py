"""Remove secrets from URLs before they are shown: a user name, a password, a key or a signature."""

from __future__ import annotations

import re

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*:/{1,2})(?:[^\s/?#'\"]*@)?(?P<rest>[^\s?#'\"]*)[^\s'\"]*")
"""A URL in a text: scheme, credentials, host and path, then query and fragment."""

_REVISION = re.compile(r"(?:huggingface|hf):/{1,2}", re.IGNORECASE)
"""Schemes with a revision after the `@`, instead of credentials before it."""


def redact(text: str) -> str:
    """The text without the user name, password, query and fragment of each URL in it: those may be secret."""
    return _URL.sub(_redact_match, text)


def database_fault(error: Exception) -> str:
    """What a user is told of an SQLAlchemy URL that is refused with this error; nothing of its password."""
    said = str(error)
    if isinstance(error, ValueError):  # it shows what stands where a number should: that may be part of the password
        said = (
            "a port or a value after ? in it is none; in a name and password write / as %2F, : as %3A, @ as %40, "
            "# as %23 and ? as %3F"
        )
    return f"{said}; sqlite:///FILE is valid, and postgresql+psycopg://... with psycopg installed"


def _redact_match(match: re.Match[str]) -> str:
    if _REVISION.fullmatch(match["scheme"]):
        return re.split(r"[?#]", match[0])[0]
    return match["scheme"] + match["rest"]
