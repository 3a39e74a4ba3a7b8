"""`sfumato add`: write a model file for a source, by looking at it; no weights are downloaded."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from sfumato.checkpoints import contents as file_contents
from sfumato.checkpoints import defaults, hub_files, pipeline_class, sources, static_capabilities, stored
from sfumato.config import ModelConfig, addresses, load
from sfumato.errors import InvalidRequest, LoadError, SfumatoError, StorageError
from sfumato.models import inspection
from sfumato.serving.catalog import Catalog
from sfumato.settings import Settings

NAME = re.compile(r"[^\w.+-]+")
GIVEN = re.compile(r"\w[\w .+-]*")
"""What `--name` may be: it is also the file's name, where spaces become dashes."""
MAX_NAME = 100


def add(source: str, name: str | None, base: str | None, settings: Settings) -> tuple[Path, str]:
    """Write the model file; returns its path and a line on what it is.

    Raises InvalidRequest if the file or the name exists, and what loading the source would, as far as can be told.
    """
    text, path = _written(source, settings.models)
    name = name or _name_of(text)
    stem = NAME.sub("-", name).strip("-.")
    if not GIVEN.fullmatch(name) or len(name) > MAX_NAME:
        raise InvalidRequest(
            f"name: {name[:MAX_NAME]!r}: up to {MAX_NAME} letters, digits, spaces and any of . _ + - are valid, a "
            "letter or digit first. Give another with --name",
            param="name",
        )
    file = settings.models / f"{stem}.yaml"
    _check_free(name, file, settings)
    config = ModelConfig(name=name, model=text, folder=settings.models.absolute(), base_model=base)
    found, config = _inspect(config)
    pipeline = pipeline_class.choose(config, found.index)
    if pipeline == pipeline_class.ANY:
        raise LoadError(
            f"{addresses.redact(source)}: nothing in it tells which pipeline draws it. Write a model file with "
            "`diffusers: {pipeline_type: ...}` by hand",
            param="diffusers.pipeline_type",
        )
    values = {"backend": "diffusers", "name": name, "parameters.model": text, "diffusers.pipeline_type": pipeline}
    if config.base_model:
        values["diffusers.base_model"] = config.base_model
    values |= defaults.of(pipeline, found.folder, found.index, found.header, f"{name} {_name_of(text)}")
    tasks = static_capabilities.static_capabilities(replace(config, pipeline_type=pipeline)).tasks or ()
    if {"image-to-image", "inpainting"} & set(tasks):
        enabled = sorted({*ModelConfig.enable_parameters, "image"})
        values["diffusers.enable_parameters"] = ",".join(enabled)
    _write(file, _yaml(values))
    size = found.size if found.size is not None else path and stored.size_of(path)
    told = [pipeline, *(f"{label} {values[key]}" for key, label in SHOWN.items() if key in values)]
    return file, ", ".join(told + ([stored.readable(size)] if size else []))


SHOWN = {
    "size": "at", "step": "steps", "cfg_scale": "guidance", "diffusers.scheduler_type": "scheduler",
    "diffusers.prediction_type": "predicts", "diffusers.base_model": "base",
}  # fmt: skip


def _written(source: str, models: Path) -> tuple[str, Path | None]:
    """The source as the model file has it, and where it is on this disk: paths are relative to the folder of models."""
    path = Path(os.path.expanduser(source))  # noqa: PTH111, of a user that does not exist it makes nothing
    for candidate in (path, models / path):
        if candidate.exists() and not re.match(r"[A-Za-z][\w+.-]*://", source):
            found = candidate.absolute()
            inside = found.is_relative_to(models.absolute())
            return (found.relative_to(models.absolute()).as_posix() if inside else str(found)), found
    return source, None


def _name_of(text: str) -> str:
    """The last part of a source, without suffix, revision and what a URL carries."""
    last = PurePosixPath(unquote(urlsplit(text).path) if "://" in text else text).name.partition("@")[0]
    suffix = PurePosixPath(last).suffix.lower()
    stem = last[: -len(suffix)] if suffix in sources.SAFE + sources.PICKLES else last
    return NAME.sub("-", stem).strip("-.") or "model"


def _check_free(name: str, file: Path, settings: Settings) -> None:
    if file.exists():
        raise InvalidRequest(f"{file} exists already; give another name with --name, or remove it", param="name")
    if any(name in (config.name, *config.aliases) for config in Catalog.of(settings).all()):
        raise InvalidRequest(f"there is a model {name} already; give another name with --name", param="name")


def _inspect(config: ModelConfig) -> tuple[inspection.Inspection, ModelConfig]:
    """What the source says, and the config with the base of a denoiser alone."""
    source = sources.resolve(config)
    header = inspection.header_of(config, source)
    if header and not config.base_model:
        made_of = file_contents.of(header)
        if made_of.needs_base and (base := _base_of_card(source) or made_of.repository):
            config = replace(config, base_model=base)
    return inspection.inspect(config, source, ask=True), config


def _base_of_card(source: sources.Source) -> str | None:
    """What a repository's card says that its files were made from, if that is a repository in diffusers' layout."""
    match source:
        case sources.Url(url) if url.startswith(f"{sources.endpoint()}/"):
            repo = "/".join(url.removeprefix(f"{sources.endpoint()}/").split("/")[:2])
        case _:
            return None
    for base in hub_files.bases_of(repo):
        try:
            if hub_files.index_of(base, None):
                return base
        except SfumatoError:  # another may do
            continue
    return None


def _yaml(values: dict[str, Any]) -> str:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, last = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[last] = value
    return str(yaml.safe_dump(nested, sort_keys=False, allow_unicode=True))


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as new:
            new.write(text)
    except FileExistsError:
        raise InvalidRequest(f"{file} exists already; give another name with --name, or remove it") from None
    except OSError as error:
        raise StorageError(f"{file} could not be written: {error.strerror or error}") from error
    load(file)  # what is written can be read
