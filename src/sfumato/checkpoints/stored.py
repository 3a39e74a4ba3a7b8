"""Which files of a model are on this disk, how large they are, and which of them Sfumato downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sfumato.checkpoints import dduf, diffusers_source, sources, split, static_capabilities, weight_file
from sfumato.config import ModelConfig
from sfumato.errors import SfumatoError

WEIGHTS = re.compile(r".*\.(safetensors|bin|ckpt|pt|pth|gguf|sft|dduf)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Stored:
    files: tuple[Path, ...]
    """Weight files, folders and snapshots of the hub's cache that the model uses, as far as they are here."""
    downloaded: tuple[Path, ...]
    """Those of `files` that Sfumato downloaded into the model file's folder, and what it keeps beside them."""
    cached: tuple[Path, ...]
    """Those of `files` that are in the hub's cache, which other programs use too."""
    complete: bool
    """Whether the model's own source is wholly here."""

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(map(size_of, self.files))


def of(config: ModelConfig) -> Stored:
    """What a model uses of this disk. Blocks."""
    files: list[Path] = []
    cached: list[Path] = []
    complete = True
    for path, is_cache, whole in _places(config):
        complete &= whole
        if path is not None and path.exists():
            (cached if is_cache else files).append(path)
    downloaded = [each for path in files for each in _of_sfumato(path, config.folder)]
    return Stored((*files, *cached), tuple(downloaded), tuple(cached), complete)


def size_of(path: Path) -> int:
    """Bytes of a file, or of what a folder has in it; a file with several names counts once."""
    if path.is_file():
        return path.stat().st_size
    sizes = {}
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                status = Path(folder, name).stat()
            except OSError:  # a link to nowhere
                continue
            sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def readable(size: int) -> str:
    """Bytes as people write them: 512 B, 3.2 MB, 6.9 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def _places(config: ModelConfig) -> Iterator[tuple[Path | None, bool, bool]]:
    """Place, whether it is the hub's cache, and whether all is there that the model's source has."""
    for file in config.downloads:
        path = config.folder / file.filename
        yield path, False, path.is_file()
    try:
        source = sources.resolve(config)
    except SfumatoError:
        yield None, False, False
        return
    match source:
        case sources.HubRepository(repo, revision):
            snapshot = static_capabilities.snapshot(repo, revision or "main")
            yield snapshot, True, snapshot is not None and _has_weights(snapshot)
        case sources.Folder(path):
            yield path, False, True
        case sources.Url(url):
            path = weight_file.path_for(url, config.folder)
            yield path, False, path.is_file()
            yield from _with_file(config, path)
        case sources.File(path):
            yield path, False, path.is_file()
            yield from _with_file(config, path)
    for name in (config.vae, config.original_config, *(each.source for each in config.adapters), *config.text_encoders):
        if name and re.match(r"https?://", name, re.IGNORECASE):
            path = weight_file.path_for(sources.hub_page(name), config.folder)
            yield path, False, path.is_file()
        elif name and (path := config.folder / name).is_file():
            yield path, False, True


def _with_file(config: ModelConfig, path: Path) -> Iterator[tuple[Path | None, bool, bool]]:
    """What belongs to a single file: where it was unpacked, and the base of a denoiser alone."""
    if not path.is_file():
        return
    if path.suffix.lower() == sources.DDUF:
        yield dduf.folder_of(path), False, True
    try:
        made_of = split.contents_of(path)
        base = split.base_of(config, made_of) if made_of and made_of.needs_base else None
    except SfumatoError:
        return
    if base is not None:
        # What its own file takes the place of is not downloaded: that its weights are not all here says nothing.
        yield from ((place, is_cache, place is not None) for place, is_cache, _ in _places(base))


def _has_weights(snapshot: Path) -> bool:
    """Whether every component that has weights has some here."""
    index = diffusers_source.json_of(snapshot / sources.INDEX)
    parts = [name for name, value in index.items() if isinstance(value, list) and (snapshot / name).is_dir()]
    described = [snapshot / name for name in parts if (snapshot / name / "config.json").is_file()]
    return bool(described) and all(any(map(is_weight, part.iterdir())) for part in described)


def is_weight(path: Path) -> bool:
    """Whether it is a file with the extension of one that holds weights."""
    return WEIGHTS.fullmatch(path.name) is not None and path.exists()


def _of_sfumato(path: Path, folder: Path) -> Iterator[Path]:
    """The file if it was downloaded or unpacked into the folder, with what is kept beside it."""
    beside = weight_file.records(path)
    inside = path.absolute().is_relative_to(folder.absolute())
    if inside and (beside or (path.is_dir() and path.name.startswith(".") and sources.DDUF in path.name.lower())):
        yield path
        yield from beside
