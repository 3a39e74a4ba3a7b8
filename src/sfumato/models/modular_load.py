"""Download and load modular pipelines: each component from its own place, the blocks from diffusers.

Loading uses no network and runs no code from repositories.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from huggingface_hub import snapshot_download

from sfumato.checkpoints import download, hub_files, modular, sources
from sfumato.checkpoints.modular import Place
from sfumato.checkpoints.weight_file import OnProgress
from sfumato.config import ModelConfig
from sfumato.errors import LoadError, ModelFileError
from sfumato.models import parts
from sfumato.pipelines.modular import adapted

PickVariant: TypeAlias = Callable[[Iterable[str]], str | None]
"""The variant to load, from the paths of a repository's files."""

LIBRARIES = frozenset({"diffusers", "transformers", None})
"""Packages whose classes an index may name. Importing any other could run its code."""


def fetch(
    config: ModelConfig,
    repo: str,
    revision: str | None,
    index: Mapping[str, Any],
    pick: PickVariant,
    report: OnProgress,
    without: Sequence[str] = (),
) -> Path:
    """The snapshot folder of a modular repository; its components are on this disk, except those `without`.

    Raises DownloadError or LoadError.
    """
    files = hub_files.files_of(repo, revision)
    found = {name: place for name, place in modular.places(index, repo, files).items() if name not in without}
    _fetch(config, [place for place in found.values() if place.repo], pick, report)
    own = [place.subfolder for place in found.values() if not place.repo]
    return _fetch_parts(config, repo, revision, own, pick(files), report)


def fetch_others(
    config: ModelConfig, folder: Path, index: Mapping[str, Any], pick: PickVariant, report: OnProgress
) -> None:
    """Have the components on this disk that are not in `folder`."""
    places = modular.places(index, None, _files(folder)).values()
    _fetch(config, [place for place in places if place.repo], pick, report)


def _fetch(config: ModelConfig, places: Iterable[Place], pick: PickVariant, report: OnProgress) -> None:
    by_source: dict[tuple[str, str | None], list[str]] = defaultdict(list)
    for place in places:
        assert place.repo
        by_source[place.repo, place.revision].append(place.subfolder)
    for (repo, revision), folders in by_source.items():
        inside = tuple(f"{folder}/" for folder in folders)
        files = [file for file in hub_files.files_of(repo, revision) if file.startswith(inside)]
        _fetch_parts(config, repo, revision, folders, pick(files), report)


def _fetch_parts(
    config: ModelConfig, repo: str, revision: str | None, folders: list[str], variant: str | None, report: OnProgress
) -> Path:
    return download.parts_from_hub(
        repo, revision=revision, folders=folders, variant=variant, pickles=config.allow_pickle, report=report
    )


def load(
    config: ModelConfig,
    folder: Path,
    index: Mapping[str, Any],
    cls: Any,
    dtype: torch.dtype,
    pick: PickVariant,
    given: Mapping[str, Any],
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """The pipeline with its components, as `modular.adapted` returns it; `given` ones are taken as they are.

    `settings`: component → how to quantise it.

    Raises LoadError or ModelFileError.
    """
    found = _places(config, folder, index)
    if foreign := {str(place.library) for place in found.values()} - {str(library) for library in LIBRARIES}:
        raise LoadError(
            f"{config.name}: its index names classes of {', '.join(sorted(foreign))}; components of diffusers and "
            "transformers are loaded, other code is never run"
        )
    snapshots = {name: _folder(place, folder) for name, place in found.items()}
    pipeline = cls(pretrained_model_name_or_path=str(folder), modular_config_dict=_index(cls, index, found, snapshots))
    _check_complete(config, pipeline, index, found)
    replaced = {**given, **parts.components(config, dtype, folder)}
    loaded = {
        name: _component(config, pipeline.get_component_spec(name), snapshots[name], dtype, pick, settings.get(name))
        for name in pipeline.pretrained_component_names
        if name in found and name not in replaced
    }
    if unknown := [name for name in replaced if name not in pipeline.components]:
        raise ModelFileError(f"{config.name}: {cls.__name__} has no {', '.join(unknown)}; leave it out")
    pipeline.update_components(**loaded, **replaced)
    return adapted(pipeline)


def folders(config: ModelConfig, folder: Path, index: Mapping[str, Any]) -> dict[str, Path]:
    """Component → its folder on this disk."""
    found = _places(config, folder, index)
    return {name: _folder(place, folder) / place.subfolder for name, place in found.items()}


def _places(config: ModelConfig, folder: Path, index: Mapping[str, Any]) -> dict[str, Place]:
    source = sources.resolve(config)
    own = source.repo if isinstance(source, sources.HubRepository) else None
    return modular.places(index, own, _files(folder))


def _files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]


def _folder(place: Place, own: Path) -> Path:
    if place.repo is None:
        return own
    pattern = f"{place.subfolder}/*" if place.subfolder else "*"
    return Path(snapshot_download(place.repo, revision=place.revision, allow_patterns=[pattern], local_files_only=True))


def _index(
    cls: Any, index: Mapping[str, Any], found: Mapping[str, Place], folders: Mapping[str, Path]
) -> dict[str, Any]:
    """The index in diffusers' modular form, with folders on this disk in the place of repositories."""
    settings = {name: value for name, value in index.items() if not isinstance(value, list)}
    components = {
        name: (
            place.library,
            place.cls,
            {
                "type_hint": (place.library, place.cls),
                "pretrained_model_name_or_path": str(folders[name]),
                "subfolder": place.subfolder,
            },
        )
        for name, place in found.items()
    }
    return {"_blocks_class_name": cls.default_blocks_name, **settings, **components}


def _check_complete(config: ModelConfig, pipeline: Any, index: Mapping[str, Any], found: Mapping[str, Place]) -> None:
    """Raise LoadError if its simplest workflow needs a component that the repository does not have."""
    first = adapted(pipeline).workflow()
    needed = [each.name for each in first.expected_components if each.default_creation_method == "from_pretrained"]
    # One that is left out on purpose is null in the index.
    missing = [name for name in needed if name not in found and name not in index]
    if missing:
        raise LoadError(
            f"{config.name}: {type(pipeline).__name__} needs {', '.join(missing)}, which this repository does not have",
            param="diffusers.pipeline_type",
        )


def _component(
    config: ModelConfig, spec: Any, folder: Path, dtype: torch.dtype, pick: PickVariant, setting: Any
) -> Any:
    has_weights = spec.type_hint is None or issubclass(spec.type_hint, torch.nn.Module)
    files = [f"{spec.subfolder}/{path.name}" for path in (folder / spec.subfolder).glob("*")]
    weights = {"dtype": dtype, "use_safetensors": None if config.allow_pickle else True} if has_weights else {}
    if setting is not None:
        weights["quantization_config"] = setting
    return spec.load(
        pretrained_model_name_or_path=str(folder),
        variant=pick(files) if has_weights else None,
        revision=None,
        local_files_only=True,
        **weights,
    )
