"""Which version of a URL's content a file is, as the server's answer says."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import httpx

from sfumato.checkpoints import sources

_SHA256 = re.compile(r"[0-9a-f]{64}")
_VOLATILE = re.compile(r"(access_?)?token|(api_?)?key|sig|signature|expires|policy|key-pair-id|x-amz-.*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Version:
    """The URL of a file, and which version of the URL's content it is."""

    url: str
    """SHA-256 of the URL without the parts that change independently of the file, such as a key."""
    validator: str = ""
    """A strong ETag, or the date: with it a server resumes only the same content."""
    size: int | None = None
    sha256: str | None = None
    checked: bool = False
    """Whether the whole file had this sha256."""
    name: str = ""
    """The server's name for the file, if the URL does not have one."""
    downloaded: bool = False
    """Whether the file came from there, and was not put there by hand."""


def is_weight_name(name: str) -> bool:
    """Whether a file of this name holds weights, by its suffix."""
    return Path(name).suffix.lower() in sources.SAFE + sources.PICKLES


def of_response(url: str, response: httpx.Response) -> Version:
    headers = response.headers
    size = None
    if span := re.fullmatch(r"bytes \d+-\d+/(\d+)", headers.get("content-range", "")):
        size = int(span[1])
    elif headers.get("content-encoding", "identity") == "identity" and headers.get("content-length", "").isdigit():
        size = int(headers["content-length"])
    etag = headers.get("etag", "")
    validator = etag if etag.startswith('"') else headers.get("last-modified", "")
    return Version(digest(url), validator, size, _sha256_by_hub(response), name=_name_of(response))


def _name_of(response: httpx.Response) -> str:
    """File name in Content-Disposition, else the last part of the final URL's path."""
    message = Message()
    message["content-disposition"] = response.headers.get("content-disposition", "")
    filename = message.get_filename() or unquote(response.url.path)
    name = re.sub(r"[^\w .()+-]", "_", re.split(r"[/\\]", filename)[-1]).strip(" .")
    return name if is_weight_name(name) or message.get_filename() else ""


def _sha256_by_hub(response: httpx.Response) -> str | None:
    """The SHA-256 that a hub sends for large files: in ETag, or in X-Linked-Etag when it redirects."""
    for answer in (*response.history, response):
        if "x-repo-commit" in answer.headers:
            etag = answer.headers.get("x-linked-etag") or answer.headers.get("etag", "")
            if _SHA256.fullmatch(etag.strip('"')):
                return str(etag).strip('"')
    return None


def digest(url: str) -> str:
    """Hash of the stable parts of a URL: without the hub's mirror, keys and signatures."""
    mirror = sources.endpoint()
    if url.startswith(f"{mirror}/"):
        url = sources.HUB + url.removeprefix(mirror)
    parts = urlsplit(url)
    query = [(name, value) for name, value in parse_qsl(parts.query) if not _VOLATILE.fullmatch(name)]
    same = parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(query), fragment="").geturl()
    return hashlib.sha256(same.encode()).hexdigest()
