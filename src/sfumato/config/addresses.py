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


def _redact_match(match: re.Match[str]) -> str:
    if _REVISION.fullmatch(match["scheme"]):
        return re.split(r"[?#]", match[0])[0]
    return match["scheme"] + match["rest"]
