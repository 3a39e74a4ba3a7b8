"""One weight file from a URL: downloaded by one process at a time, resumed, and renamed only when complete.

    NAME            the file; for a URL in `parameters.model` NAME includes a hash of the URL, so no two share a file
    .NAME.lock      held by the downloading process; the system releases it if that process dies
    .NAME.part      the bytes received so far
    .NAME.source    the URL and the version of its content; a `.part` is resumed only if both match

Before the rename the file on disk (not the received bytes) must have the right size and, if known, checksum.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

import filelock
import httpx

from sfumato.checkpoints import sources, url_version
from sfumato.checkpoints.remote_limits import ANY, Limits, TooLarge
from sfumato.checkpoints.url_version import Version, is_weight_name
from sfumato.checkpoints.url_version import digest as digest_of
from sfumato.config import addresses
from sfumato.errors import DownloadError, LoadError

log = logging.getLogger(__name__)

OnProgress: TypeAlias = Callable[[float | None, str], None]
"""Called with the progress of a download: fraction 0 .. 1 (None: unknown) and the name of the file."""

TIMEOUT_S = 30.0
BROKEN = (httpx.RemoteProtocolError, httpx.ReadError, httpx.ReadTimeout)
"""A connection broke or fell silent."""
RETRIES, RETRY_S = 3, 1.0
"""Connections that break without a byte before a download is given up; the wait after the first, longer after each."""
WAIT_S = 1.0
"""Whoever waits for another process says so this often."""
ON = ("1", "ON", "YES", "TRUE")
"""huggingface_hub's words for a switch."""
MAX_RETRY_AFTER_S = 3600
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fetch(url: str, target: Path, *, sha256: str | None, report: OnProgress, limits: Limits = ANY) -> Path:
    """Download the file to `target`. Raises DownloadError with a readable message, LoadError for what `limits` refuse.

    If several processes need it at once, one downloads it and the others wait for it.
    """
    if sha256:
        sha256 = sha256.lower()
    with as_download_errors(url, target):
        if _is_complete(target, url, sha256):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target, report):
            if not _is_complete(target, url, sha256):
                _download(url, target, sha256, report, limits)
    return target


def path_for(url: str, folder: Path, *, by_hand: bool = True) -> Path:
    """Path for the file of a URL: its own name plus a hash of the URL, as many are called `model.safetensors`.

    A file with its own name that was put there by hand is used by the first URL that needs it, unless `by_hand` is
    False. If a URL has no file name, the server names the file; until it is downloaded, the path has only the hash.
    """
    name = unquote(Path(urlsplit(url).path).name).replace("/", "_")
    plain, mark = folder / name, digest_of(url)[:10]
    if not is_weight_name(name):
        existing = (path for path in folder.glob(f"[!.]*-{mark}.*") if path.is_file())
        return next(existing, folder / f"{name[:80]}-{mark}")
    if by_hand and plain.is_file() and ((version := _version(plain)) is None or version.url == digest_of(url)):
        return plain
    return plain.with_name(f"{plain.stem}-{mark}{plain.suffix}")


def stamp(file: Path) -> tuple[int, int, int] | None:
    """Size, time of change and inode, which differ when a file is replaced or written over; None: it is not there."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def obtain(url: str, folder: Path, *, report: OnProgress, by_hand: bool = True, limits: Limits = ANY) -> Path:
    """Download the file of a URL to its path (`path_for`), if necessary. Raises DownloadError or LoadError."""
    target = path_for(url, folder, by_hand=by_hand)
    if not by_hand and target.is_file() and not records(target):
        target.unlink()
        target = path_for(url, folder, by_hand=False)
    if is_weight_name(target.name):
        if target.exists() and _version(target) is None:
            with _optional():
                _remember(target, Version(digest_of(url), "", target.stat().st_size))
        return fetch(url, target, sha256=None, report=report, limits=limits)
    with as_download_errors(url, target):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(target, report):
            if (path := path_for(url, folder, by_hand=by_hand)) == target:
                if not target.exists():
                    _download(url, target, None, report, limits)
                path = _move_to_server_name(url, target)
    return path


@contextmanager
def in_lower_case(path: Path) -> Iterator[Path]:
    """A path to the file with a suffix that diffusers recognises: it only accepts `.safetensors` in lower case."""
    suffix = {".sft": ".safetensors"}.get(path.suffix.lower(), path.suffix.lower())
    if suffix == path.suffix or suffix not in sources.SAFE:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"{path.stem}{suffix}"
        link.symlink_to(path.absolute())
        yield link


def _move_to_server_name(url: str, target: Path) -> Path:
    """Rename the downloaded file to the server's name for it. Raises LoadError if that is not a weight file."""
    version = _version(target)
    name = Path((version.name if version else "") or target.name + _suffix_of(target))
    if not is_weight_name(name.name):
        _sidecar(target, "source").unlink(missing_ok=True)
        target.unlink()
        raise LoadError(
            f"{addresses.redact(url)} leads to {name.name!r}, which is not a weight file; {', '.join(sources.SAFE)} "
            "can be loaded. If it is a page that asks who you are, put a token into the URL",
            param="parameters.model",
        )
    renamed = target.with_name(f"{name.stem[:120]}-{digest_of(url)[:10]}{name.suffix}")
    _sidecar(target, "source").replace(_sidecar(renamed, "source"))
    return target.replace(renamed)


def _suffix_of(path: Path) -> str:
    """Suffix by the file's first bytes; empty if it is neither safetensors nor GGUF."""
    with path.open("rb") as file:
        first = file.read(9)
    if first[:4] == b"GGUF":
        return ".gguf"
    return ".safetensors" if first[8:] == b"{" and int.from_bytes(first[:8], "little") < path.stat().st_size else ""


def _is_complete(target: Path, url: str, sha256: str | None) -> bool:
    if not target.exists():
        return False
    version, size = _version(target), target.stat().st_size
    recorded = version.sha256 if version and version.checked and version.size == size else None
    if sha256 is None:
        if version and version.url != digest_of(url):
            raise DownloadError(
                f"{target} exists already and came from another URL than {addresses.redact(url)}; "
                "give each its own `filename`, or remove the file"
            )
    elif recorded != sha256:
        digest = _sha256_of(target)
        if digest != sha256:
            raise DownloadError(
                f"{target}: the file's sha256 is {digest}, the model file says {sha256}. "
                "Remove it to download it again."
            )
        with _optional():
            came = version is not None and version.downloaded
            _remember(target, Version(digest_of(url), "", size, sha256, checked=True, downloaded=came))
    return True


def _download(url: str, target: Path, sha256: str | None, report: OnProgress, limits: Limits) -> None:
    check_online(url, target)
    part = _sidecar(target, "part")
    for resumed in (True, False):
        if not resumed:
            part.unlink(missing_ok=True)
        version, offset = _receive_all(url, target, part, report, limits)
        version = replace(version, sha256=sha256 or version.sha256)
        size, digest = part.stat().st_size, _sha256_of(part) if version.sha256 else None
        if version.size in (None, size) and digest == version.sha256:
            break
        if not (resumed and offset):  # else the earlier part was of other content: restart once from the beginning
            part.unlink()
            _sidecar(target, "source").unlink(missing_ok=True)
            raise DownloadError(_mismatch(url, version, size, digest, sha256))
        log.warning("%s: the partial download does not match; starting over", target.name)
    _remember(target, replace(version, size=size, checked=version.sha256 is not None, downloaded=True))
    part.replace(target)


def check_online(url: str, target: Path) -> None:
    """Raises DownloadError if the file is the hub's, which must not be asked."""
    if _origin(url) == _origin(sources.endpoint()) and os.environ.get("HF_HUB_OFFLINE", "").upper() in ON:
        raise DownloadError(f"{addresses.redact(url)} is not at {target}, and HF_HUB_OFFLINE is set. Fetch it before")


def _mismatch(url: str, version: Version, size: int, digest: str | None, sha256: str | None) -> str:
    if version.size not in (None, size):
        return f"{addresses.redact(url)}: {size} of {version.size} bytes arrived. Nothing was kept; try again."
    source = "the model file" if sha256 else "the hub"
    return f"{addresses.redact(url)}: the file's sha256 is {digest}, {source} says {version.sha256}. Nothing was kept."


def _receive_all(url: str, target: Path, part: Path, report: OnProgress, limits: Limits) -> tuple[Version, int]:
    """`_receive`, again after a connection that broke or fell silent: as long as bytes arrive, and then a few times."""
    tries = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            return _receive(url, target, part, report, limits)
        except TooLarge:
            part.unlink(missing_ok=True)
            _sidecar(target, "source").unlink(missing_ok=True)
            raise
        except BROKEN as error:
            tries = 0 if part.exists() and part.stat().st_size > before else tries + 1
            if tries >= RETRIES:
                raise
            log.warning("%s: the connection broke (%s); going on with what arrived", target.name, type(error).__name__)
            time.sleep(RETRY_S * tries)


def _receive(url: str, target: Path, part: Path, report: OnProgress, limits: Limits) -> tuple[Version, int]:
    """Download the missing bytes of `part`; returns the version of the file and the offset this started at."""
    before = _version(target)
    offset = part.stat().st_size if part.exists() else 0
    if not (offset and before and before.url == digest_of(url) and before.validator):
        offset = 0
    # A compressed response would have a different length than the file.
    headers = {"accept-encoding": "identity", **authorization(url)}
    if offset and before:
        headers |= {"range": f"bytes={offset}-", "if-range": before.validator}
    with limits.client(TIMEOUT_S) as client, client.stream("GET", url, headers=headers) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE and offset:
            part.unlink()
            return _receive(url, target, part, report, limits)
        response.raise_for_status()
        version = url_version.of_response(url, response)
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("content-range", ""))
        partial = response.status_code == httpx.codes.PARTIAL_CONTENT
        if partial and not (
            offset and before and span and int(span[1]) == offset and version.validator == before.validator
        ):
            response.close()
            part.unlink(missing_ok=True)  # not the range that was requested
            if not offset:
                raise DownloadError(f"{addresses.redact(url)}: the server sent a range that was not requested")
            return _receive(url, target, part, report, limits)
        if not partial:
            offset = 0
        limits.check_size(url, version.size or 0)
        _check_space(target, (version.size or 0) - offset)
        _remember(target, version)
        with part.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.truncate()
            for chunk in response.iter_bytes():  # as it comes: what a broken connection brought is kept
                file.write(chunk)
                limits.check_size(url, file.tell())
                report(min(1.0, file.tell() / version.size) if version.size else None, target.name)
            file.flush()
            os.fsync(file.fileno())
    return version, offset


def authorization(url: str) -> dict[str, str]:
    """The hub's token, for the hub's host only; httpx removes it when a redirect leads to another host."""
    if _origin(url) != _origin(sources.endpoint()):
        return {}
    from huggingface_hub import get_token  # imported late: the API process only asks for paths

    token = get_token()
    return {"authorization": f"Bearer {token}"} if token else {}


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme.lower(), parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme.lower())


@contextmanager
def _locked(target: Path, report: OnProgress) -> Iterator[None]:
    lock = filelock.FileLock(_sidecar(target, "lock"))
    while True:
        try:
            lock.acquire(timeout=WAIT_S)
            break
        except filelock.Timeout:
            report(None, f"{target.name} (another process is downloading it)")
    try:
        yield
    finally:
        # Before releasing it: a process waiting for this file sees that it is gone, and creates a new one.
        _sidecar(target, "lock").unlink(missing_ok=True)
        lock.release()


def _check_space(target: Path, missing: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if missing > free:
        raise DownloadError(
            f"{target.name}: {missing / 1e6:.0f} MB are needed but {target.parent} has {free / 1e6:.0f} MB free; "
            "make room on that disk"
        )


@contextmanager
def as_download_errors(url: str, target: Path) -> Iterator[None]:
    """Turn what httpx and the system raise while downloading a URL to `target` into errors with a remedy."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        if error.response.status_code in (401, 403):
            raise LoadError(
                _refused(url, error.response.status_code)
            ) from None  # its message has the URL, with secrets
        wait = error.response.headers.get("retry-after", "")
        seconds = min(int(wait), MAX_RETRY_AFTER_S) if wait.isdigit() else None
        when = f". Try again in {seconds} s" if seconds else ""
        raise DownloadError(
            f"{addresses.redact(url)} could not be downloaded to {target}: the server answered "
            f"{error.response.status_code} {error.response.reason_phrase}{when}"
        ).after(seconds) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DownloadError(
            f"{addresses.redact(url)} could not be downloaded to {target}: {addresses.redact(str(error))}"
        ) from None
    except OSError as error:
        if error.errno in FULL:
            with _optional():
                _sidecar(target, "part").unlink(missing_ok=True)
            raise DownloadError(f"{target}: the disk is full ({error.strerror}); make room there") from error
        raise DownloadError(
            f"{addresses.redact(url)} could not be written to {target}: {error.strerror or error}. Let the server "
            f"write to {target.parent}, or put the file there"
        ) from error


def _refused(url: str, status: int) -> str:
    start = f"{addresses.redact(url)} could not be fetched: the server answers {status}"
    if _origin(url) != _origin(sources.endpoint()):
        return f"{start}; put the token that it wants into the URL, or fetch the file by hand"
    token_state = "HF_TOKEN is of an account that may not read it" if authorization(url) else "no HF_TOKEN is set"
    return f"{start}: it is gated or private, and {token_state}. Accept its licence on the hub, and set HF_TOKEN"


@contextmanager
def _optional() -> Iterator[None]:
    """Ignore errors when writing optional records, as the folder may not be writable."""
    try:
        yield
    except OSError as error:
        log.debug("%s", error)


def _sidecar(target: Path, extension: str) -> Path:
    return target.with_name(f".{target.name}.{extension}")


def records(target: Path) -> list[Path]:
    """What is kept beside a file because it was downloaded; empty if it was put there by hand, also later."""
    if (version := _version(target)) is None or not version.downloaded:
        return []
    if target.is_file() and version.size not in (None, target.stat().st_size):
        return []
    return [path for path in (_sidecar(target, name) for name in ("source", "part", "lock")) if path.exists()]


def _version(target: Path) -> Version | None:
    """The recorded version of a file; None if it was not downloaded."""
    try:
        return Version(**json.loads(_sidecar(target, "source").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _remember(target: Path, version: Version) -> None:
    record = _sidecar(target, "source")
    new = record.with_name(f"{record.name}.{os.getpid()}")
    new.write_text(json.dumps(asdict(version)))
    new.replace(record)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
