"""Look at a model's source without its weights: its class, what describes it, and what loading it would refuse.

The one place that does so: for `sfumato add` and `check`, and before anything is downloaded for a load. It reads files
on this disk and headers; it asks a hub or a web server, for a few kilobytes, only where it is told to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

from sfumato.checkpoints import (
    contents,
    dduf,
    descriptions,
    diffusers_source,
    feature_caches,
    folder_weights,
    hub_files,
    pipeline_class,
    priors,
    sources,
    split,
    static_capabilities,
    tiny_vaes,
    weight_file,
    weight_header,
)
from sfumato.checkpoints.contents import Contents
from sfumato.checkpoints.sources import Source
from sfumato.checkpoints.weight_header import Header
from sfumato.config import ModelConfig, addresses
from sfumato.errors import DownloadError, LoadError, ModelFileError, SfumatoError
from sfumato.models import context_parallel, low_memory


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a source says of itself."""

    source: Source
    index: Mapping[str, Any] = field(default_factory=dict)
    """Its `model_index.json`, or that of what describes it; empty: not known without asking, or there is none."""
    folder: Path | None = None
    """Configurations of its components, in diffusers' layout, if they are on this disk."""
    header: Header | None = None
    contents: Contents | None = None
    """Of a single file."""
    base: str | None = None
    """Hub id or folder of what describes a single file."""

    @property
    def size(self) -> int | None:
        """Bytes of a single file; None if they are not known, and for other sources."""
        return self.header.size if self.header else None


def inspect(config: ModelConfig, source: Source, *, ask: bool) -> Inspection:
    """Look at a source. `ask`: also at a hub or server. Raises what loading it would, as far as this tells."""
    match source:
        case sources.Folder(path):
            folder_weights.refuse_damaged(path, str(path), pickles=config.allow_pickle)
            return Inspection(source, pipeline_class.index_of(path), path)
        case sources.HubRepository(repo, revision):
            folder = hub_files.described(repo, revision) if ask else static_capabilities.folder_of(config)
            index = pipeline_class.index_of(folder) if folder else {}
            return Inspection(source, index, folder)
        case sources.Url(url):
            return _of_url(config, source, url, ask)
        case sources.File(path):
            return _of_file(config, source, path, ask)


def header_of(config: ModelConfig, source: Source) -> Header | None:
    """The header of a single file, on this disk or behind its URL; else None. Raises what reading it would."""
    match source:
        case sources.File(path) if path.suffix.lower() in sources.TENSORS:
            return weight_header.of_file(path)
        case sources.Url(url) if PurePosixPath(urlparse(url).path).suffix.lower() not in (
            sources.DDUF,
            *sources.PICKLES,
        ):
            return weight_header.of_url(url, config.folder)
    return None


def refuse(config: ModelConfig, source: Source) -> None:
    """Raises what loading would refuse and what can be known before anything is downloaded. Asks hub and server."""
    match source:
        case sources.HubRepository(repo, revision):
            name = choose(config, hub_files.index_of(repo, revision), ask=True)
            if tiny_vaes.TINY in (config.vae, config.preview_vae):
                refuse_vae(config, name, hub_files.described(repo, revision))
        case sources.Url():
            choose(config, inspect(config, source, ask=True).index, ask=True)
        case sources.File() if split.is_gguf(config):
            split.base_of(config, _made_of(source.path))


def choose(config: ModelConfig, index: Mapping[str, Any], device: str | None = None, *, ask: bool = False) -> str:
    """The pipeline class. Raises what keeps it, its prior, or a low-memory key with it, from working; `device` if it is
    known. `ask`: the hub is asked about the prior."""
    name = pipeline_class.choose(config, index)
    priors.check(config, name, ask=ask)
    context_parallel.check(config, index)
    low_memory.check(config, name, index, device or ("cpu" if config.cuda is False else None))
    if name not in (pipeline_class.ANY, *pipeline_class.AUTO):
        feature_caches.check(config, name, index)
    return name


def refuse_vae(config: ModelConfig, name: str, folder: Path | None) -> None:
    """Raises ModelFileError for a tiny VAE that cannot draw with the pipeline class `name`. `folder`: with the
    configurations of its components, if it is here."""
    tiny_vaes.check(config, name, diffusers_source.json_of(folder / "vae" / "config.json") if folder else {})


def base(config: ModelConfig, made_of: Contents | None, *, ask: bool = True) -> split.Base:
    """What describes a denoiser alone. Raises ModelFileError, LoadError or DownloadError."""
    of_base = split.base_of(config, made_of)
    match sources.resolve(of_base):
        case sources.Folder(path):
            folder: Path | None = path
        case sources.HubRepository(repo, revision):
            folder = hub_files.described(repo, revision) if ask else static_capabilities.folder_of(of_base)
        case _:
            raise ModelFileError(
                f"{config.name}: base_model: {of_base.label} is a single file; name a repository (owner/name) or a "
                f"folder with a {sources.INDEX}",
                param="diffusers.base_model",
            )
    index = diffusers_source.json_of(folder / sources.INDEX) if folder else {}
    if folder and not index:
        raise LoadError(
            f"{config.name}: base_model: {of_base.label} has no {sources.INDEX}; name one in diffusers' layout",
            param="diffusers.base_model",
        )
    pipeline_class.choose(config, index)
    return split.Base(of_base, folder or Path(), index)


def _of_url(config: ModelConfig, source: Source, url: str, ask: bool) -> Inspection:
    path = weight_file.path_for(url, config.folder)
    suffix = PurePosixPath(urlparse(url).path).suffix.lower()
    if path.is_file():
        return _of_file(config, source, path, ask)
    if suffix == split.GGUF:
        split.base_of(config, None)
    if not ask or suffix not in sources.TENSORS:
        return Inspection(source)
    header = weight_header.of_url(url, config.folder)
    return _of_header(config, source, header, addresses.redact(url), ask)


def _of_file(config: ModelConfig, source: Source, path: Path, ask: bool) -> Inspection:
    suffix = path.suffix.lower()
    if suffix == split.GGUF:
        split.base_of(config, _made_of(path))
    if suffix == sources.DDUF and path.is_file():
        return Inspection(source, dduf.index_of(path))
    if suffix not in sources.TENSORS or not path.is_file():
        return Inspection(source)
    inspection = _of_header(config, source, weight_header.of_file(path), str(path), ask)
    made_of = inspection.contents
    if made_of and made_of.needs_base and inspection.folder:
        found = base(config, made_of, ask=ask)
        # Files that are elsewhere are looked at when they are here.
        local = {name: config.folder / name for name in config.text_encoders if (config.folder / name).is_file()}
        split.assign(config, path, local, found)
    return inspection


def _of_header(config: ModelConfig, source: Source, header: Header, label: str, ask: bool) -> Inspection:
    made_of = contents.of(header)
    contents.refuse(made_of, label)
    if made_of.needs_base:
        found = base(config, made_of, ask=ask)
        folder = found.folder if found.index else None
        return Inspection(source, found.index, folder, header, made_of, found.config.model)
    repo = made_of.repository
    return Inspection(source, _index(repo, ask), _folder(repo), header, made_of, repo)


def _index(repo: str | None, ask: bool) -> Mapping[str, Any]:
    folder = _folder(repo)
    if folder or not (repo and ask):
        return diffusers_source.json_of(folder / sources.INDEX) if folder else {}
    try:
        return diffusers_source.json_of(hub_files.described(repo, None) / sources.INDEX)
    except (DownloadError, LoadError):  # said when it is needed
        return {}


def _folder(repo: str | None) -> Path | None:
    return (static_capabilities.snapshot(repo, "main") or descriptions.of(repo)) if repo else None


def _made_of(path: Path) -> Contents | None:
    try:
        return split.contents_of(path)
    except SfumatoError:
        return None
