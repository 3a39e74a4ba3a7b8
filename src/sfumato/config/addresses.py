"""Addresses as they may be shown: a URL can carry a name, a password, a key or a signature."""

from __future__ import annotations

import re

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*:/{1,2})(?:[^\s/?#'\"]*@)?(?P<rest>[^\s?#'\"]*)[^\s'\"]*")
"""In a text: scheme, credentials, host and path, then query and fragment."""

_REVISION = re.compile(r"(?:huggingface|hf):/{1,2}", re.IGNORECASE)
"""Here `@` stands before a revision."""


def shown(text: str) -> str:
    """The text, with each URL in it less what may be secret: user name and password, query and fragment."""
    return _URL.sub(_without_secrets, text)


def _without_secrets(match: re.Match[str]) -> str:
    if _REVISION.fullmatch(match["scheme"]):
        return re.split(r"[?#]", match[0])[0]
    return match["scheme"] + match["rest"]
