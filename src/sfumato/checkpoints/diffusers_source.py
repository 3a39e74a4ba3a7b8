"""Read diffusers' source as text: importing it would cost the API process seconds and gigabytes."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfumato.pipelines import syntax

FOLDERS = ("modular_pipelines", "pipelines", "models", "image_processor.py")
"""Where the classes are that Sfumato looks up; of two classes with one name, the one in the later place."""


def root() -> Path:
    spec = importlib.util.find_spec("diffusers")
    assert spec
    assert spec.origin
    return Path(spec.origin).parent


def defaults(function: ast.FunctionDef) -> dict[str, Any]:
    """Argument → default; a default that is not a literal is `...`."""
    positional, spec = function.args.args, function.args
    pairs = [
        *zip(positional[len(positional) - len(spec.defaults) :], spec.defaults, strict=True),
        *((arg, default) for arg, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if default),
    ]
    values: dict[str, Any] = {}
    for arg, default in pairs:
        try:
            values[arg.arg] = ast.literal_eval(default)
        except ValueError:
            values[arg.arg] = ...
    return values


def methods(name: str, method: str) -> Iterator[ast.FunctionDef]:
    """The definitions of a method: of a diffusers class and, after it, of its base classes."""
    definition = _class(name)
    if definition is None:
        return
    for node in definition.body:
        if isinstance(node, ast.FunctionDef) and node.name == method:
            yield node
    for base in definition.bases:
        if isinstance(base, ast.Name) and base.id != name:
            yield from methods(base.id, method)


def fields(name: str) -> dict[str, str]:
    """The annotated attributes of a dataclass and of its base classes, each with its annotation."""
    definition = _class(name)
    if definition is None:
        return {}
    bases = [base.id for base in definition.bases if isinstance(base, ast.Name) and base.id != name]
    inherited = {field: text for base in bases for field, text in fields(base).items()}
    return inherited | {
        node.target.id: ast.unparse(node.annotation)
        for node in definition.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def literal(name: str, attribute: str) -> Any:
    """The value of a class attribute; None if the class does not have it, or if it is not a literal."""
    definition = _class(name)
    for node in definition.body if definition else ():
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == attribute:
            try:
                return ast.literal_eval(node.value)
            except ValueError:
                return None
    return None


def inherited(name: str, attribute: str) -> Any:
    """The value of a class attribute of a class or the first of its base classes that has one; None: none has."""
    definition = _class(name)
    if definition is None:
        return None
    if (value := literal(name, attribute)) is not None:
        return value
    bases = [base.id for base in definition.bases if isinstance(base, ast.Name) and base.id != name]
    return next((value for base in bases if (value := inherited(base, attribute)) is not None), None)


def assigned(name: str, attribute: str) -> ast.expr | None:
    """What a class attribute is set to, by a class or the first of its base classes that does; None: none does."""
    for each in (name, *ancestors(name)):
        definition = _class(each)
        for node in definition.body if definition else ():
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            value = getattr(node, "value", None)
            if isinstance(targets[0], ast.Name) and targets[0].id == attribute and isinstance(value, ast.expr):
                return value
    return None


@functools.cache
def attributes(name: str) -> frozenset[str]:
    """The names of all attributes that the methods of a diffusers class and of its base classes use."""
    definitions = [definition for each in (name, *ancestors(name)) if (definition := _class(each))]
    nodes = (node for definition in definitions for node in ast.walk(definition))
    return frozenset(node.attr for node in nodes if isinstance(node, ast.Attribute))


def ancestors(name: str) -> Iterator[str]:
    """The names of the base classes of a diffusers class, and of theirs."""
    definition = _class(name)
    for base in definition.bases if definition else ():
        if isinstance(base, ast.Name) and base.id != name:
            yield base.id
            yield from ancestors(base.id)


@functools.cache
def _class(name: str) -> ast.ClassDef | None:
    path = files().get(name)
    if path is None:
        return None
    tree = syntax.parsed(path.read_text(encoding="utf-8"))
    return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)


@functools.cache
def files() -> Mapping[str, Path]:
    """diffusers class → the file that defines it."""
    paths = [
        path
        for name in FOLDERS
        for path in ([root() / name] if name.endswith(".py") else (root() / name).rglob("*.py"))
    ]
    classes = re.compile(r"^class (\w+)", re.MULTILINE)
    return {name: path for path in paths for name in classes.findall(path.read_text(encoding="utf-8"))}


def json_of(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file or it has no object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
