"""Where a model's weights come from: existing paths first, then by the form of the source.

Nothing here downloads, and nothing imports torch or diffusers.
"""

from __future__ import annotations

import mimetypes
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeAlias, TypeVar
from urllib.parse import urlparse

from sfumato.config import ModelConfig, addresses
from sfumato.errors import LoadError, ModelFileError, SfumatoError

HUB = "https://huggingface.co"
INDEX = "model_index.json"
DDUF = ".dduf"
TENSORS = (".safetensors", ".sft", ".gguf")
SAFE = (*TENSORS, DDUF)
MODULAR_INDEX = "modular_model_index.json"
INDEXES = (INDEX, MODULAR_INDEX)
"""What a repository in diffusers' layout has one of; with both, the first counts."""
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")

SPLIT_FOLDERS = ("diffusion_models", "unet")
"""ComfyUI's folders for denoisers."""

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,95})"
_HUB_ID = re.compile(rf"({_PART}/{_PART})(?:@([^\s@]+))?")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/{0,2}(.*)")
_HUB_SCHEMES = ("huggingface", "hf")


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A diffusers repository on the hub."""

    repo: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Url:
    """A single weight file to download."""

    url: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class File:
    """A single weight file on this disk (or one of `download_files`, downloaded before it is read)."""

    path: Path


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder in diffusers' layout."""

    path: Path


Source: TypeAlias = HubRepository | Url | File | Folder
AnyPath = TypeVar("AnyPath", Path, PurePosixPath)


def resolve(config: ModelConfig) -> Source:
    """What `parameters.model` (or `artifacts`) refers to.

    An existing path wins; then come URLs and hub ids. Raises ModelFileError if the text cannot be
    a source, LoadError if what it names does not exist.
    """
    text = config.repo or config.model
    if config.repo:
        fetched = config.folder / config.snapshot if config.snapshot else None
        return Folder(fetched) if fetched and has_index(fetched) else _hub(config, config.repo)
    # os.path, because Path raises on `~nobody` and on names that are too long to be one.
    path = (config.folder / os.path.expanduser(text)).absolute()  # noqa: PTH111
    awaited = [(config.folder / file.filename).absolute() for file in config.downloads]
    if os.path.isfile(path) or path in awaited:  # noqa: PTH113
        return File(weights(config, path))
    if os.path.isdir(path):  # noqa: PTH112
        return _layout(config, path)
    if scheme := _SCHEME.fullmatch(text):
        return _remote(config, scheme[1].lower(), scheme[2])
    suffix = PurePosixPath(text).suffix.lower()
    if suffix in SAFE + PICKLES or text.startswith(("/", "~", ".")) or not _HUB_ID.fullmatch(text):
        raise LoadError(_not_found(config, path), param="parameters.model")
    return _hub(config, text)


def has_index(folder: Path) -> bool:
    """Whether a folder is in diffusers' layout."""
    return any((folder / name).is_file() for name in INDEXES)


def is_hub_id(text: str) -> bool:
    return bool(_HUB_ID.fullmatch(text))


def suffix_of(config: ModelConfig) -> str:
    """Suffix of a model's weight file, in lower case; empty for a repository, a folder or an invalid source."""
    try:
        source = resolve(config)
    except SfumatoError:
        return PurePosixPath(config.model).suffix.lower()
    match source:
        case File(path):
            return path.suffix.lower()
        case Url(url):
            return PurePosixPath(urlparse(url).path).suffix.lower()
    return ""


def download_url(uri: str, revision: str | None = None) -> str:
    """The http(s) URL of a file's `uri`: a URL, or `huggingface://owner/name[@revision]/path`.

    `revision` is used if the `uri` names none.
    """
    scheme = _SCHEME.fullmatch(uri)
    kind = scheme[1].lower() if scheme else ""
    if kind in ("http", "https"):
        return hub_page(uri)
    parts = scheme[2].split("/") if scheme and kind in _HUB_SCHEMES else []
    repo = _HUB_ID.fullmatch("/".join(parts[:2]))
    if repo is None or len(parts) < 3 or not all(parts):
        raise ModelFileError(
            f"uri {addresses.redact(uri)!r}: must be https://... or huggingface://owner/name/file",
            param="download_files",
        )
    path = "/".join(parts[2:])
    file, _, branch = path.partition("@")
    return f"{endpoint()}/{repo[1]}/resolve/{repo[2] or branch or revision or 'main'}/{file}"


def endpoint() -> str:
    """The hub's URL, without a trailing slash."""
    return os.environ.get("HF_ENDPOINT", HUB).rstrip("/")


def hub_page(url: str) -> str:
    """A link copied from a file's page on the hub leads to the file itself."""
    return url.replace("/blob/", "/resolve/", 1) if url.startswith(f"{HUB}/") else url


def _hub(config: ModelConfig, repo: str) -> HubRepository:
    match = _HUB_ID.fullmatch(repo)
    if match is None:
        raise ModelFileError(
            f"{_location(config)}: {repo!r} is not a hub id; use owner/name or owner/name@revision",
            param="parameters.model",
        )
    return HubRepository(match[1], match[2] or config.revision)


def _remote(config: ModelConfig, scheme: str, rest: str) -> Source:
    if scheme in ("http", "https"):
        url = f"{scheme}://{rest}"
        segments = [part for part in urlparse(url).path.split("/") if part]
        if url.startswith(f"{HUB}/") and len(segments) == 2:
            return _hub(config, "/".join(segments))
        if not urlparse(url).netloc or not segments:
            raise ModelFileError(
                f"{_location(config)}: {config.label!r} names no file to download", param="parameters.model"
            )
        if mimetypes.guess_type(segments[-1])[0] or PurePosixPath(segments[-1]).suffix.lower() in SAFE + PICKLES:
            weights(config, PurePosixPath(segments[-1]))
        return Url(hub_page(url))  # without a suffix, the server's answer names the file
    if scheme in _HUB_SCHEMES:
        rest = re.split(r"[?#]", rest)[0].strip("/")
        if rest.count("/") < 2:
            return _hub(config, rest)
        weights(config, PurePosixPath(rest.partition("@")[0] if "@" in rest.rpartition("/")[2] else rest))
        return Url(download_url(f"hf://{rest}", config.revision))
    raise ModelFileError(
        f"{_location(config)}: {config.label!r}: {scheme}:// is not supported; use http://, https://, huggingface:// "
        "or hf://",
        param="parameters.model",
    )


def weights(config: ModelConfig, path: AnyPath, key: str = "parameters.model") -> AnyPath:
    """The path, if its file can be loaded, else raises ModelFileError; `key` is the model file's key for it."""
    suffix = path.suffix.lower()
    if suffix in SAFE or (suffix in PICKLES and config.allow_pickle):
        return path
    if suffix in PICKLES:
        raise ModelFileError(
            f"{_location(config)}: {path} is a pickle, which can run arbitrary code when it is loaded. Use a "
            ".safetensors file, or set `allow_pickle: true` if you trust it",
            param=key,
        )
    raise ModelFileError(
        f"{_location(config)}: {path} is not a weight file; use one of {', '.join(SAFE)}",
        param=key,
    )


def _layout(config: ModelConfig, path: Path) -> Folder | File:
    if has_index(path):
        return Folder(path)
    denoisers = [
        file
        for name in SPLIT_FOLDERS
        if not (path / name / "config.json").is_file()
        for file in sorted((path / name).rglob("*"))
        if file.suffix.lower() in TENSORS
    ]
    if len(denoisers) == 1:
        return File(denoisers[0])
    files = [file.relative_to(path).as_posix() for file in denoisers] or sorted(
        file.name for file in path.iterdir() if file.suffix.lower() in SAFE
    )
    remedy = f"name the file: {config.label}/{files[0]}" if files else "download it again, or name a single file"
    if len(files) > 1:
        remedy = f"name one of its files: {', '.join(f'{config.label}/{file}' for file in files[:8])}"
    raise LoadError(
        f"{_location(config)}: the folder {path} has no {INDEX}, which every diffusers model needs; {remedy}",
        param="parameters.model",
    )


def _not_found(config: ModelConfig, path: Path) -> str:
    files = sorted(file.name for file in config.folder.glob("*") if file.suffix.lower() in SAFE)
    hint = f" That folder has {', '.join(files[:8])}." if files else ""
    return (
        f"{_location(config)}: {config.label!r} is neither a path ({path} does not exist) nor a hub id (owner/name). "
        f"Put it there, or fix parameters.model.{hint}"
    )


def _location(config: ModelConfig) -> str:
    return f"{config.file}: {config.name}" if config.file else config.name
