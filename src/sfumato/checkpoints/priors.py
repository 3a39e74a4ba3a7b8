"""The prior that a model file names: whose pipeline makes embeddings of pictures (FLUX.1 Redux)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.checkpoints import class_reading, diffusers_source, hub_files, modular, sources, split, static_capabilities
from sfumato.config import ModelConfig, addresses
from sfumato.errors import LoadError, ModelFileError

KEY = "diffusers.prior"


def source_of(config: ModelConfig) -> sources.Folder | sources.HubRepository:
    """Where the prior is. Raises ModelFileError or LoadError if a model file names no folder and no hub id."""
    name = config.prior or ""
    try:
        source = sources.resolve(split.with_source(config, name))
    except LoadError as error:
        raise LoadError(f"{config.name}: prior: {error.message}", param=KEY) from error
    if isinstance(source, sources.Folder | sources.HubRepository):
        return source
    raise ModelFileError(
        f"{config.name}: prior: {addresses.redact(name)} is a single file; name a repository (owner/name) or a folder "
        f"with a {sources.INDEX}",
        param=KEY,
    )


def check(config: ModelConfig, base: str, *, ask: bool) -> None:
    """Raises ModelFileError if the prior does not make what the class `base` draws from, as far as is known.

    `ask`: of one that is not on this disk the hub is asked.
    """
    if config.prior is None:
        return
    reading, takes = class_reading.of_name(base), class_reading.parameters(base) or {}
    if modular.is_one(base) or (reading and (reading.problem(config.options) or reading.inputs)):
        raise ModelFileError(
            f"{config.name}: prior: {base} does not draw from a prompt alone; name a model that does in "
            "parameters.model (for FLUX.1 Redux: FLUX.1-dev or FLUX.1-schnell), or leave the prior out",
            param=KEY,
        )
    name = _index(config, ask).get("_class_name")
    if name is None and not ask:
        return  # not known
    made = class_reading.of_name(name) if isinstance(name, str) else None
    fields = class_reading.output_fields(name) if isinstance(name, str) else frozenset()
    if not (made and made.output and made.sources and fields and fields <= takes.keys()):
        what = f"a {name}" if name else f"no pipeline ({sources.INDEX} is missing)"
        raise ModelFileError(
            f"{config.name}: prior: {addresses.redact(config.prior)} is {what}, which makes no embeddings of pictures "
            f"that {base} draws from. For a FLUX.1 model name black-forest-labs/FLUX.1-Redux-dev, or leave it out",
            param=KEY,
        )


def _index(config: ModelConfig, ask: bool) -> Mapping[str, Any]:
    match source_of(config):
        case sources.Folder(path):
            return diffusers_source.json_of(path / sources.INDEX)
        case sources.HubRepository(repo, revision) if ask:
            return hub_files.index_of(repo, revision)
        case sources.HubRepository(repo, revision):
            snapshot = static_capabilities.snapshot(repo, revision or "main")
            return diffusers_source.json_of(snapshot / sources.INDEX) if snapshot else {}
