"""A mapping of a model file -> `ModelConfig`, or the reason why it is not one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from sfumato import schedulers
from sfumato.config import addresses, readers
from sfumato.config.document import Document, documents, read
from sfumato.config.keys import (
    CUSTOM_PREFIX,
    IGNORED,
    IMAGE_KEYS,
    IMG2IMG,
    KEYS,
    LANGUAGE_KEYS,
    REDIRECTS,
    RENAMED,
    SECTIONS,
)
from sfumato.config.model import Adapter, ModelConfig
from sfumato.errors import InvalidRequest, ModelFileError, did_you_mean
from sfumato.sampling import nested

_BY_PATH = {key.path: key for key in KEYS}
_VALID_KEYS = (*_BY_PATH, *IGNORED, *SECTIONS)
_MODEL_KEYS = {"name", "alias", "backend", "artifacts", *SECTIONS, *REDIRECTS}
_NAME_LINE = re.compile(r"^-? {0,8}name:([^\n]{1,300})$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Redirect:
    """LocalAI's pure alias: requests for `name` are served by the model `target`."""

    name: str
    target: str
    file: Path


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file, or one of its models, that is not for Sfumato."""

    file: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Broken:
    """A model definition with an error; requests for one of `names` get that error."""

    names: tuple[str, ...]
    file: Path
    error: ModelFileError
    may_recover: bool = False
    """The file could not be read: this may resolve itself without a change to the file."""


ParsedFile: TypeAlias = ModelConfig | Redirect | Skipped | Broken


def outcomes(file: Path) -> list[ParsedFile]:
    """The models of a file. Never raises: an error in one model does not affect the others."""
    file = file.absolute()
    text = ""
    try:
        text = read(file)
        created = int(file.stat().st_mtime)
        parsed = documents(text, file)
    except ModelFileError as error:
        return [Broken((*_names_in(text), file.stem), file, error)]
    except OSError as error:
        unread = ModelFileError(f"{file}: cannot be read: {error.strerror}; fix that, or remove the file")
        return [Broken((*_names_in(text), file.stem), file, unread, may_recover=True)]
    default_name = file.stem if len(parsed) == 1 else None
    return [_outcome(document, file, created, default_name) for document in parsed]


def _names_in(text: str) -> list[str]:
    """The model names that a file with invalid YAML seems to contain."""
    lines = (line.partition("#")[0].strip().strip("\"'") for line in _NAME_LINE.findall(text))
    return [name for name in dict.fromkeys(lines) if name]


def load(file: Path) -> list[ModelConfig]:
    """The models of one file. Raises ModelFileError for the first one with an error."""
    parsed = outcomes(file)
    for outcome in parsed:
        if isinstance(outcome, Broken):
            raise outcome.error
    return [outcome for outcome in parsed if isinstance(outcome, ModelConfig)]


def config_for(model: str) -> ModelConfig:
    """A config for weights without a model file: a hub id, path or URL from the command line."""
    every = ModelConfig.enable_parameters | {"image"}
    return ModelConfig(name=addresses.redact(model), model=model, folder=Path.cwd(), enable_parameters=every)


def _outcome(document: Document, file: Path, created: int, default_name: str | None) -> ParsedFile:
    values = document.values
    name = values.get("name") or default_name
    if reason := _not_ours(values):
        return Skipped(file, f"{name}: {reason}" if name else reason)
    try:
        return _parse(_Source(document, file), file, created, default_name)
    except ModelFileError as error:
        return Broken((name,) if isinstance(name, str) else (), file, error)


def _not_ours(values: Any) -> str | None:
    if not _MODEL_KEYS & values.keys():
        return f"not a model file: it has none of the keys {', '.join(sorted(_MODEL_KEYS))}"
    backend = values.get("backend")
    if isinstance(backend, str) and backend and "diffusers" not in backend.split("-"):
        return f"backend {backend} is not for Sfumato, which uses diffusers"
    parameters = values.get("parameters")
    model = parameters.get("model") if isinstance(parameters, dict) else None
    routes = [key for key in REDIRECTS if values.get(key)]
    if routes and not model and not values.get("artifacts"):
        return f"`{routes[0]}` without `parameters.model`: it configures LocalAI's routing, not a model"
    if not backend and (mark := _of_language(values, model)):
        return f"{mark}, and no word of pictures: not an image model. Write `backend: diffusers` if it is one"
    return None


def _of_language(values: Any, model: Any) -> str | None:
    """What tells that a file without `backend` is for another of LocalAI's backends."""
    uses = values.get("known_usecases")
    usecases = [
        str(use).lower().removeprefix("flag_") for use in (uses if isinstance(uses, list) else [uses] if uses else [])
    ]
    if any(usecase in ("image", "video", "any") for usecase in usecases) or any(key in values for key in IMAGE_KEYS):
        return None
    if usecases:
        return f"`known_usecases` are {', '.join(usecases[:5])}"
    if marks := [key for key in LANGUAGE_KEYS if values.get(key)]:
        return f"it has `{marks[0]}`"
    if isinstance(model, str) and urlsplit(model).path.lower().endswith(".gguf"):
        return "it is a .gguf file"
    return None


@dataclass(frozen=True, slots=True)
class _Source:
    document: Document
    file: Path

    def error(self, path: str, message: str) -> ModelFileError:
        line = self.document.lines.get(path)
        return ModelFileError(f"{self.file}{f', line {line}' if line else ''}: {path}: {message}", param=path)

    def entries(self) -> Iterator[tuple[str, Any]]:
        """Dotted path and value of every key that is set; null and "" count as not set."""
        for key, value in self.document.values.items():
            if key not in SECTIONS:
                yield key, value
            elif isinstance(value, dict):
                yield from ((f"{key}.{_key_text(inner)}", item) for inner, item in value.items())
            elif value not in (None, ""):
                raise self.error(key, f"{readers.shorten(value)} needs `key: value` lines below it")


def _parse(source: _Source, file: Path, created: int, default_name: str | None) -> ModelConfig | Redirect:
    # 1. Reject unknown keys, with the nearest known one as a suggestion.
    values = dict(source.entries())
    for path in values:
        if path not in _BY_PATH and path not in IGNORED and not path.startswith(CUSTOM_PREFIX):
            raise source.error(path, f"unknown key.{_nearest(path)} Correct or remove it.")
    ignored = [(path, IGNORED[path]) for path in values if path in IGNORED]

    # 2. Read every value; if two keys set one field, the later row of the table wins.
    fields: dict[str, Any] = {}
    for key in KEYS:
        value = values.get(key.path)
        if value is None or value == "":
            continue
        if key.read in readers.TEXTS:
            value = source.document.texts.get(key.path, value)
        try:
            fields[key.field] = key.read(value)
        except ValueError as error:
            raise source.error(key.path, f"{readers.shorten(value)}: {error}") from None

    # 3. Keys that are not fields themselves.
    backend = fields.pop("backend", None)
    if backend and "diffusers" not in backend.split("-"):
        raise source.error("backend", f"{backend} is not the name of a backend; use `diffusers`")
    name = fields.pop("name", None) or _name_of_file(source, default_name)
    alias: tuple[str, ...] = fields.pop("alias", ())
    repo, revision, fields["snapshot"] = fields.pop("artifacts", (None, None, None))
    fields["repo"], fields["revision"] = repo, fields.get("revision") or revision
    fields["model"] = fields.get("model") or repo
    if not fields["model"]:
        if len(alias) == 1:
            return Redirect(name, alias[0], file)
        raise source.error("parameters.model", "is missing; set it to a hub id, a folder, a .safetensors file or a URL")
    fields["aliases"] = tuple(dict.fromkeys([*alias, *fields.get("aliases", ())]))
    fields["width"], fields["height"] = fields.pop("size", None) or (None, None)
    fields["adapters"] = _adapters(source, fields)
    ignored += _options(source, fields)
    if fields.get("quantization") in readers.OF_LANGUAGE_MODELS:
        ignored += [("quantization", f"{fields.pop('quantization')} is for language models")]
    if str(fields.get("vae", "")).lower() in ("none", "automatic"):
        del fields["vae"]
    _pictures(fields)
    _scheduler(source, fields)

    # 4. A value that its reader takes as "not set" leaves the default in force.
    fields = {field: value for field, value in fields.items() if value is not None}
    arguments = nested(fields)
    return ModelConfig(name=name, file=file, folder=file.parent, created=created, ignored=tuple(ignored), **arguments)


def _name_of_file(source: _Source, stem: str | None) -> str:
    """The name of a model whose file says none."""
    if not stem:
        raise source.error("name", "is missing; each model in a list needs one")
    try:
        return readers.name(stem)
    except ValueError:
        raise source.error(
            "name",
            f"is missing, and the file's own name {stem!r} cannot be one: it needs 1 to 200 printable characters in "
            "UTF-8. Write `name:`, or rename the file",
        ) from None


def _key_text(key: Any) -> str:
    return key if isinstance(key, str) else readers.shorten(key)


def _nearest(path: str) -> str:
    """Suggest the same key in its right section, else the nearest key."""
    last_part = path.rpartition(".")[2]
    moved = [key for key in _VALID_KEYS if key.rpartition(".")[2] == last_part]
    return f" Did you mean {moved[0]!r}?" if moved else did_you_mean(path, _VALID_KEYS)


def _adapters(source: _Source, fields: dict[str, Any]) -> tuple[Adapter, ...]:
    single, scale = fields.pop("lora_adapter", None), fields.pop("lora_scale", 1.0)
    several, scales = fields.pop("lora_adapters", ()), fields.pop("lora_scales", ())
    if scales and len(scales) != len(several):
        raise source.error(
            "lora_scales", f"{len(scales)} scales for {len(several)} lora_adapters; set one for each, or none"
        )
    first = (Adapter(single, scale),) if single else ()
    return first + tuple(map(Adapter, several, scales or [scale] * len(several)))


def _options(source: _Source, fields: dict[str, Any]) -> list[tuple[str, str]]:
    """Sets what they say; returns those that say nothing, as `ModelConfig.ignored` has it."""
    lines, switches = fields.pop("options", ((), ()))
    lines = dict(lines)
    if "torch_dtype" in lines:
        try:
            dtype = readers.dtype(lines.pop("torch_dtype"))
        except ValueError as error:
            raise source.error("options", f"torch_dtype {error}") from None
        fields["dtype"] = fields.get("dtype") or dtype
    fields["option_lines"] = tuple(lines.items())
    return [(f"options: {switch}", "a switch of another backend: an argument is `key:value`") for switch in switches]


def _pictures(fields: dict[str, Any]) -> None:
    if (name := str(fields.get("pipeline_type"))) in RENAMED:
        fields["pipeline_type"] = RENAMED[name]
    if fields.get("img2img"):
        fields["pipeline_type"] = IMG2IMG.get(fields.get("pipeline_type", ""), fields.get("pipeline_type"))
    if fields.get("img2img") or fields.get("prior"):
        fields["enable_parameters"] = fields.get("enable_parameters", ModelConfig.enable_parameters) | {"image"}


def _scheduler(source: _Source, fields: dict[str, Any]) -> None:
    name, schedule = fields.get("scheduler"), fields.pop("schedule", None)
    if schedule and not name:
        raise source.error("diffusers.schedule", f"{schedule!r} needs a diffusers.scheduler_type beside it")
    if name:
        try:
            fields["scheduler"] = schedulers.parse(name, schedule).name
        except InvalidRequest as error:
            raise source.error("diffusers.scheduler_type", error.message) from None
