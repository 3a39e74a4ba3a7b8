"""The LoRAs that requests may name: files in the folder `loras` beside the model files, on the hub, or behind a URL.

Nothing here needs torch.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from sfumato.checkpoints import named_files, request_files, sources, weight_file, weight_header
from sfumato.checkpoints.hub_files import as_download_errors
from sfumato.checkpoints.remote_limits import HUB, Limits
from sfumato.config import ModelConfig, addresses
from sfumato.errors import DownloadError, InvalidRequest, LoadError, ModelFileError
from sfumato.loras import Lora, hashed, name_of

FOLDER = "loras"

DOWNLOADED = "loras"
"""In the data folder: what URLs of requests brought. Files that were put there by hand are not used."""

SUFFIXES = (".safetensors", ".sft")

CHUNK = 1 << 20

BASE_KEYS = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")

_OF_REPOSITORY = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<path>[^@]+?)(?:@(?P<branch>[^@]+))?)?"
)
_HUB_SCHEME = re.compile(r"(huggingface|hf):/{0,2}", re.IGNORECASE)
_URL = re.compile(r"https?://", re.IGNORECASE)
_SUFFIX = re.compile(r"\.[a-z]\w*")
"""Not the end of a version, as in `/download/v1.5`: the server names such a file."""


def found(folder: Path) -> dict[str, Path]:
    """The LoRAs beside the model files in `folder`, by their path below `loras` without the suffix."""
    root = folder / FOLDER
    files = [path for path in named_files.below(root) if path.suffix.lower() in SUFFIXES and path.is_file()]
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in files}


@dataclass(frozen=True, slots=True)
class Described:
    """A file as lists have it."""

    path: str
    """Below `loras`."""
    bytes: int
    base: str | None
    """The kind of model that it is made for, as its header says."""
    metadata: Mapping[str, Any]


def described(folder: Path) -> dict[str, Described]:
    """Those of `found` that can be read."""
    answer = {}
    for name, path in found(folder).items():
        try:
            size, metadata = path.stat().st_size, weight_header.of_file(path).metadata
        except (LoadError, OSError):
            continue
        base = next((str(metadata[key])[:200] for key in BASE_KEYS if metadata.get(key)), None)
        answer[name] = Described(path.relative_to(folder / FOLDER).as_posix(), size, base, metadata)
    return answer


def shown(source: str) -> str:
    """What names a LoRA, without secrets."""
    return addresses.redact(source)


def of_model(config: ModelConfig) -> dict[str, str]:
    """The model file's own LoRAs, in its order: name → what it says."""
    return {name_of(adapter.source): adapter.source for adapter in config.adapters}


def locate(lora: Lora, config: ModelConfig, limits: Limits, data: Path) -> Lora:
    """The LoRA with its file, downloaded if necessary. Raises InvalidRequest naming `loras`, or DownloadError.

    `limits`: of downloads. `data`: the folder of the setting.
    """
    source = lora.source.strip()
    label = addresses.redact(source)
    try:
        remote = bool(_URL.match(source) or _HUB_SCHEME.match(source))
        number = _number(source, config)
        path = None if remote or number is not None else _in_folder(source, config.folder)
        if number is not None:
            return replace(lora, source=label, default=number)
        downloads = (data / DOWNLOADED).absolute()
        if path is None and not remote and limits.hosts:
            path = _with_hash(source, downloads)
        if path is None:
            path = _downloaded(source, config, limits, downloads)
        if path is None:
            raise _unknown(source, config)
        if path.suffix.lower() not in SUFFIXES:
            raise _no_safetensors(label)
        weight_header.of_file(path)
        stamp = weight_file.stamp(path)
        hashes = digests(path)
    except DownloadError:
        raise
    except (LoadError, ModelFileError) as error:
        raise InvalidRequest(f"loras: {label!r}: {error.message}", param="loras") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "is not a name"
        raise InvalidRequest(f"loras: {label[:200]!r}: {why}", param="loras") from None
    return replace(lora, source=label, file=str(path), sha256=hashes[0], short_hash=hashes[1], stamp=stamp)


def is_here(lora: Lora, config: ModelConfig, limits: Limits) -> bool:
    """Whether nothing is downloaded for it: it is the model file's, a file in the folder, or what `locate` refuses."""
    source = lora.source.strip()
    remote = _URL.match(source) or _HUB_SCHEME.match(source)
    try:
        here = _number(source, config) is not None or (not remote and _in_folder(source, config.folder) is not None)
        return here or _remote(source, config, limits) is None
    except (OSError, ValueError, LoadError, ModelFileError, InvalidRequest):
        return True  # `locate` says what is wrong with it


def _number(source: str, config: ModelConfig) -> int | None:
    """The number of the model file's LoRA that has this name, or that the file names so."""
    name, _ = hashed(source) or ("", "")
    for number, adapter in enumerate(config.adapters):
        if source in (adapter.source, addresses.redact(adapter.source), name_of(adapter.source)):
            return number
        if _URL.match(adapter.source) and name == name_of(adapter.source):
            return number
    return None


def _with_hash(source: str, folder: Path) -> Path | None:
    """The file that a URL has brought, by what infotexts call it: name and short hash."""
    if (named := hashed(source)) is None:
        return None
    files = [path for path in sorted(folder.glob("[!.]*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
    return next((path for path in files if weight_file.records(path) and digests(path)[1] == named[1]), None)


def _in_folder(source: str, folder: Path) -> Path | None:
    """The file in the folder that a name or a path below it means; None if there is none."""
    parts = PurePosixPath(source.replace("\\", "/")).parts
    if ".." in parts or source.startswith(("/", "\\", "~")) or re.match(r"[A-Za-z]:[\\/]", source) or "\0" in source:
        raise InvalidRequest(
            f"loras: {source[:200]!r} leads out of the folder {FOLDER}/; use a name or a path below it", param="loras"
        )
    files = found(folder)
    wanted = "/".join(parts)
    wanted = wanted[: -len(PurePosixPath(wanted).suffix)] if wanted.lower().endswith(SUFFIXES) else wanted
    exact = [path for name, path in files.items() if name == wanted]
    if exact := exact or [path for name, path in files.items() if name.casefold() == wanted.casefold()]:
        return exact[0]
    if "/" in wanted:
        return None
    named = [name for name in files if PurePosixPath(name).name.casefold() == wanted.casefold()]
    if len(named) > 1:
        raise InvalidRequest(
            f"loras: {source!r} may be {', '.join(named[:5])}; name one by its path below {FOLDER}/", param="loras"
        )
    return files[named[0]] if named else None


def _remote(source: str, config: ModelConfig, limits: Limits) -> str | re.Match[str] | None:
    """The URL, or the parts of a hub id, whose file may be downloaded; None if it is neither. Raises InvalidRequest."""
    if _URL.match(source):
        if source.startswith(f"{sources.HUB}/"):
            source = sources.hub_page(source)
        _refuse_host(urlsplit(source).hostname or "", limits)
        suffix = PurePosixPath(unquote(urlsplit(source).path)).suffix.lower()
        if _SUFFIX.fullmatch(suffix) and suffix not in SUFFIXES:
            raise _no_safetensors(addresses.redact(source))
        return source
    match = _OF_REPOSITORY.fullmatch(_HUB_SCHEME.sub("", source))
    if match is None or (match["path"] is None and source.lower().endswith(SUFFIXES + sources.PICKLES)):
        return None
    if match["path"] is None and difflib.get_close_matches(source[:100], found(config.folder), n=1, cutoff=0.8):
        return None
    _refuse_host(HUB, limits)
    return match


def _downloaded(source: str, config: ModelConfig, limits: Limits, folder: Path) -> Path | None:
    """The file of a URL or a hub id; None if it is neither."""
    match = _remote(source, config, limits)
    if match is None:
        return None
    if isinstance(match, str):
        return weight_file.obtain(match, folder, report=lambda fraction, what: None, by_hand=False, limits=limits)
    repo, revision = match["repo"], match["revision"] or match["branch"]
    remedy = f"Put the file into {FOLDER}/"
    with as_download_errors(repo, remedy):
        file = match["path"] or _only_file(repo, request_files.names(repo, revision, remedy))
        if not file.lower().endswith(SUFFIXES):
            raise _no_safetensors(addresses.redact(source))
        return request_files.fetch(repo, revision, [file], limits, remedy) / file


def _no_safetensors(label: str) -> InvalidRequest:
    return InvalidRequest(f"loras: {label[:200]!r} is no .safetensors file; others are not loaded", param="loras")


def _only_file(repo: str, files: Sequence[str]) -> str:
    candidates = sorted(file for file in files if file.lower().endswith(SUFFIXES))
    usual = [file for file in candidates if file.endswith("pytorch_lora_weights.safetensors")]
    if len(candidates) == 1 or usual:
        return (usual or candidates)[0]
    listed = f"one of {', '.join(candidates[:8])}" if candidates else "it has no .safetensors file"
    raise InvalidRequest(f"loras: {repo}: name its file ({repo}/FILE): {listed}", param="loras")


def _refuse_host(host: str, limits: Limits) -> None:
    if not limits.allow(host):
        allowed = ", ".join(limits.hosts or ()) or "nowhere"
        raise InvalidRequest(
            f"loras: nothing is downloaded from {host[:200]} for requests (the setting lora_hosts: {allowed}); put the "
            f"file into {FOLDER}/ beside the model files, or let the operator add the host",
            param="loras",
        )


def _unknown(source: str, config: ModelConfig) -> InvalidRequest:
    names = [*found(config.folder), *of_model(config)]
    short = {PurePosixPath(name).name.casefold(): name for name in names}
    close = difflib.get_close_matches(name_of(source)[:100].casefold(), short, n=3, cutoff=0.5)
    if close:
        remedy = f"did you mean {', '.join(short[each] for each in close)}?"
    else:
        remedy = f"there are {', '.join(names[:20])}" if names else "that folder has none"
    return InvalidRequest(
        f"loras: there is no LoRA {source[:200]!r} in {FOLDER}/ beside the model files; {remedy}", param="loras"
    )


def digests(path: Path) -> tuple[str, str]:
    """SHA-256 of the file, and the first twelve digits of that of its tensors, which other tools know it by."""
    return _digests(path, weight_file.stamp(path))


@functools.lru_cache(maxsize=1024)
def _digests(path: Path, stamp: tuple[int, int, int] | None) -> tuple[str, str]:
    whole, tensors = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as file:
        first = file.read(8)
        header = first + file.read(int.from_bytes(first, "little"))
        whole.update(header)
        while chunk := file.read(CHUNK):
            whole.update(chunk)
            tensors.update(chunk)
    return whole.hexdigest(), tensors.hexdigest()[:12]
