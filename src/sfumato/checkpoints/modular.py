"""Modular repositories: which of diffusers' classes draws one, and where each of its components is.

A `modular_model_index.json` names for each component a repository, a folder in it, a revision and a variant, so parts
may come from several repositories. A repository with an ordinary `model_index.json` loads too: all parts are its own.
Nothing here imports torch; `modular_load` does the loading.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.checkpoints import diffusers_source, sources
from sfumato.errors import UnfitPipeline

SUFFIX = "ModularPipeline"

BASE = "ModularPipeline"
"""The class of a repository that brings its own blocks."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a component comes from."""

    repo: str | None
    """A hub id; None: the model's own repository or folder."""
    subfolder: str
    revision: str | None
    library: str | None
    """The package of its class; None: its configuration names the class."""
    cls: str | None


def is_one(name: str) -> bool:
    """Whether a class of this name is a modular pipeline."""
    return name.endswith(SUFFIX)


def successor(name: str) -> str:
    """The installed class for an index that names `name`: itself, or the modular one if diffusers has only that."""
    return name if name in diffusers_source.files() else sibling(name) or name


def check(name: str, index: Mapping[str, Any] | None) -> None:
    """Raise UnfitPipeline for a modular pipeline that cannot be loaded, or that draws no pictures.

    `index`: the repository's, None if it is not known yet.
    """
    if name == BASE or name not in diffusers_source.files():
        blocks = (index or {}).get("_blocks_class_name") or "none"
        raise UnfitPipeline(
            f"this repository is made for {name} with blocks of its own ({blocks}), which the installed diffusers does "
            f"not have; code from repositories is never run. A newer diffusers may have them",
            param="diffusers.pipeline_type",
        )
    if not draws(name):
        raise UnfitPipeline(
            f"{name} draws no pictures (its blocks declare no `images`); name a model of another class",
            param="diffusers.pipeline_type",
        )


@functools.cache
def draws(name: str) -> bool:
    """Whether the blocks of a modular class declare pictures as their output."""
    path = diffusers_source.files().get(name)
    if path is None:
        return False
    return any('"images"' in file.read_text(encoding="utf-8") for file in path.parent.glob("decoders.py"))


def sibling(name: str) -> str | None:
    """The modular class for repositories of the class `name`, if diffusers has one."""
    modular = name if is_one(name) else f"{name.removesuffix('Pipeline')}{SUFFIX}"
    return modular if modular in diffusers_source.files() else None


def misfit(name: str, listed: str) -> str:
    """Why a modular class does not fit a repository that names `listed`; empty if nothing speaks against it."""
    family, other = _family(name), _family(listed)
    families = {path.name for path in (diffusers_source.root() / "modular_pipelines").iterdir()}
    return f"{name} is of the family {family}, {listed} of {other}" if family != other and other in families else ""


def _family(name: str) -> str:
    path = diffusers_source.files().get(name)
    return path.parent.name if path else ""


def workflows(name: str) -> Mapping[str, Any] | None:
    """The workflows that the blocks of a modular class declare; None if they declare none."""
    blocks = diffusers_source.literal(name, "default_blocks_name")
    found: Mapping[str, Any] | None = diffusers_source.literal(blocks, "_workflow_map") if blocks else None
    return found


def places(index: Mapping[str, Any], own: str | None, files: Collection[str]) -> dict[str, Place]:
    """Component → where it is, without the components that are left out.

    `own`: the hub id of the model's own repository, None for a folder; `files`: the paths in it. In a folder what is
    there is taken, whatever repository the index names; a path of another machine is never one.
    """
    found: dict[str, Place] = {}
    for name, entry in index.items():
        match entry:
            case [library, cls, dict(spec)]:
                repo, subfolder = spec.get("pretrained_model_name_or_path") or spec.get("repo"), spec.get("subfolder")
                library, cls = spec.get("type_hint") or (library, cls)
            case [library, cls]:
                spec, repo, subfolder = {}, None, name
            case _:
                continue
        here = any(file.startswith(f"{subfolder}/") for file in files) if subfolder else repo is not None
        foreign = isinstance(repo, str) and repo != own and sources.is_hub_id(repo) and not (own is None and here)
        if foreign or (here and (cls or repo)):
            elsewhere = (repo, spec.get("revision")) if foreign else (None, None)
            found[name] = Place(elsewhere[0], subfolder or "", elsewhere[1], library, cls)
    return found
