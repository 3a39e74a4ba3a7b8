"""A model's capabilities before it is loaded: read from its files, and from diffusers' source as text.

Neither diffusers nor torch is imported, which would take seconds and gigabytes in the API process.
What the files do not say is None; once the model is loaded, `core.ModelInfo` has everything.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import json
import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sfumato.config import ModelConfig
from sfumato.errors import SfumatoError
from sfumato.models import single_file, sources, weight_file
from sfumato.pipelines import capabilities, tokens

FOLDERS = ("pipelines", "models", "image_processor.py")
"""The parts of diffusers' source with the classes to look up."""

DEFAULT_MULTIPLE = 8
"""Default of diffusers' image processors."""


@dataclass(frozen=True, slots=True)
class StaticCapabilities:
    """The part of `core.ModelInfo` that files reveal."""

    pipeline: str | None = None
    tasks: tuple[str, ...] | None = None
    size_multiple: int | None = None
    prompt_tokens: int | None = None


class _Unknown(Exception):
    """An expression that cannot be evaluated without the model."""


def static_capabilities(config: ModelConfig) -> StaticCapabilities:
    """Capabilities of a model file; None for what is not on this disk. Blocks."""
    folder = _folder(config)
    index = _json(folder / sources.INDEX) if folder else {}
    name = config.pipeline_type if config.pipeline_type not in (None, "DiffusionPipeline") else index.get("_class_name")
    if not isinstance(name, str) or (parameters := _parameters(name)) is None:
        return StaticCapabilities(name if isinstance(name, str) else None)
    tasks = capabilities.tasks_of(name, parameters)
    if not index or folder is None:
        return StaticCapabilities(name, tasks)
    given = {"controlnet": config.control_net, "text_encoder": config.clip_model}
    parts = _Parts(folder, index | {part: ["", ""] for part, source in given.items() if source})
    return StaticCapabilities(name, tasks, _multiple(name, parts), _tokens(parameters, parts, config.options))


class _Parts:
    """The components of a folder in diffusers' layout, read from their configurations."""

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        self._folder = folder
        self._classes = {
            part: str(value[1]) for part, value in index.items() if isinstance(value, list) and value[1:] != [None]
        }

    def __contains__(self, part: object) -> bool:
        return part in self._classes

    def setting(self, part: str, key: str) -> Any:
        """A component's setting: from its configuration, else its class's default. Raises _Unknown."""
        config = _json(self._folder / part / "config.json")
        if key in config:
            return config[key]
        for function in _methods(self._classes.get(part, ""), "__init__"):
            if key in (defaults := _defaults(function)):
                return defaults[key]
        raise _Unknown

    def tokenizer(self, part: str) -> tuple[str, Any]:
        """The tokenizer's class, and its maximum length in tokens, if it says so."""
        config = _json(self._folder / part / "tokenizer_config.json")
        return self._classes.get(part, ""), config.get("model_max_length")


def _tokens(parameters: Mapping[str, inspect.Parameter], parts: _Parts, options: Mapping[str, Any]) -> int | None:
    """Equals `tokens.capacity` of the loaded pipeline."""
    limit = parameters.get("max_sequence_length")
    asked = options.get("max_sequence_length", limit.default if limit else None)
    rooms = []
    for part, encoder in tokens.ENCODERS.items():
        if part in parts and encoder in parts:
            kind, most = parts.tokenizer(part)
            room = most if "CLIP" in kind or not isinstance(asked, int) else asked
            if isinstance(room, int) and room < tokens.ENDLESS:
                rooms.append(room)
    return max(rooms, default=None)


def _multiple(name: str, parts: _Parts) -> int | None:
    """Equals `arguments.size_multiple`, from the arithmetic in the class's `__init__`."""
    if larger := capabilities.UPSCALERS.get(name):
        return larger.multiple * larger.factor
    own: dict[str, Any] = {}
    processor: Any = None
    for function in _methods(name, "__init__"):
        for target, value in _assigned(function):
            if target == "image_processor" and isinstance(value, ast.Call):
                said = [each.value for each in value.keywords if each.arg == "vae_scale_factor"]
                processor = _value(said[0], own, parts) if said else DEFAULT_MULTIPLE
            else:
                own[target] = _value(value, own, parts)
    factor = processor if processor is not None else own.get("vae_scale_factor", DEFAULT_MULTIPLE)
    return int(factor) if isinstance(factor, int | float) and factor else None


def _assigned(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    """Its assignments to attributes of `self`, in order."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and _attribute(node.targets[0]):
            yield _attribute(node.targets[0]), node.value


def _attribute(node: ast.expr) -> str:
    """`name` of `self.name`, else an empty string."""
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if own and isinstance(node, ast.Attribute) else ""


OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = MappingProxyType(
    {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
     ast.Pow: operator.pow}
)  # fmt: skip
FUNCTIONS: Mapping[str, Callable[[Any], Any]] = MappingProxyType({"len": len, "sum": sum, "int": int})


def _value(node: ast.expr, own: Mapping[str, Any], parts: _Parts) -> Any:
    """Value of an expression over components' configurations; None if it needs more than those."""
    try:
        return _worked_out(node, own, parts)
    except (_Unknown, TypeError, ValueError):
        return None


def _worked_out(node: ast.expr, own: Mapping[str, Any], parts: _Parts) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_worked_out(left, own, parts), _worked_out(right, own, parts))
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_worked_out(value, own, parts) for value in values)
        case ast.IfExp(test=test, body=body, orelse=otherwise):
            return _worked_out(body if _worked_out(test, own, parts) else otherwise, own, parts)
        case ast.Call(
            func=ast.Name(id="getattr" | "hasattr"), args=[ast.Name(id="self"), ast.Constant(value=part), *_]
        ):
            return part in parts
        case ast.Call(func=ast.Name(id=name), args=[argument]) if name in FUNCTIONS:
            return FUNCTIONS[name](_worked_out(argument, own, parts))
        case ast.Compare(left=left, ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]) if _attribute(left):
            return _attribute(left) in parts
        case ast.Attribute(value=ast.Attribute(value=inner, attr="config"), attr=key) if _attribute(inner):
            return parts.setting(_attribute(inner), key)
        case ast.Attribute(value=inner, attr=key) if _attribute(inner):
            return parts.setting(_attribute(inner), key)
        case ast.Attribute(attr=name) if _attribute(node) and own.get(name) is not None:
            return own[name]
    raise _Unknown


@functools.cache
def _parameters(name: str) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a pipeline's call, as in `capabilities.parameters_of`; None if there is no such class."""
    for function in _methods(name, "__call__"):
        defaults = _defaults(function)
        names = [each.arg for each in (*function.args.args, *function.args.kwonlyargs) if each.arg != "self"]
        kind = inspect.Parameter.KEYWORD_ONLY
        return {
            each: inspect.Parameter(each, kind, default=defaults.get(each, inspect.Parameter.empty)) for each in names
        }
    return None


def _defaults(function: ast.FunctionDef) -> dict[str, Any]:
    """Argument → default; `...` for anything but a literal."""
    positional, spec = function.args.args, function.args
    pairs = [
        *zip(positional[len(positional) - len(spec.defaults) :], spec.defaults, strict=True),
        *((each, default) for each, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if default),
    ]
    defaults: dict[str, Any] = {}
    for each, default in pairs:
        try:
            defaults[each.arg] = ast.literal_eval(default)
        except ValueError:
            defaults[each.arg] = ...
    return defaults


def _methods(name: str, method: str) -> Iterator[ast.FunctionDef]:
    """The methods of this name of a diffusers class and then of its bases."""
    known = _class(name)
    if known is None:
        return
    for each in known.body:
        if isinstance(each, ast.FunctionDef) and each.name == method:
            yield each
    for base in known.bases:
        if isinstance(base, ast.Name) and base.id != name:
            yield from _methods(base.id, method)


@functools.cache
def _class(name: str) -> ast.ClassDef | None:
    path = _files().get(name)
    if path is None:
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next((each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == name), None)


@functools.cache
def _files() -> Mapping[str, Path]:
    """diffusers class → the file that defines it."""
    found = importlib.util.find_spec("diffusers")
    assert found and found.origin
    root = Path(found.origin).parent
    paths = [
        path for name in FOLDERS for path in ([root / name] if name.endswith(".py") else (root / name).rglob("*.py"))
    ]
    classes = re.compile(r"^class (\w+)", re.MULTILINE)
    return {name: path for path in paths for name in classes.findall(path.read_text(encoding="utf-8"))}


def _folder(config: ModelConfig) -> Path | None:
    """The folder with the model's files in diffusers' layout, if it is on this disk."""
    try:
        source = sources.resolve(config)
    except SfumatoError:
        return None  # requests for the model get this error
    match source:
        case sources.Folder(path):
            return path
        case sources.HubRepository(repo, revision):
            return _snapshot(repo, revision or "main")
        case sources.File(path):
            return _description(path)
        case sources.Url(url):
            return _description(weight_file.place(url, config.folder))


def _description(path: Path) -> Path | None:
    """The folder that describes a single file, if it was downloaded."""
    repo = single_file.described_by(path)
    return _snapshot(repo, "main") if repo else None


def _snapshot(repo: str, revision: str) -> Path | None:
    """A repository's folder in huggingface_hub's cache."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE", Path(home) / "hub")).expanduser()
    folder = cache / ("models--" + repo.replace("/", "--"))
    try:
        commit = (folder / "refs" / revision).read_text().strip()
    except OSError:
        commit = revision
    snapshot = folder / "snapshots" / commit
    return snapshot if (snapshot / sources.INDEX).is_file() else None


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing or does not contain an object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
