"""diffusers' own source, as text: importing it would take seconds and gigabytes in the process that answers HTTP."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDERS = ("pipelines", "models", "image_processor.py")
"""Which have the classes that are asked about."""


def root() -> Path:
    found = importlib.util.find_spec("diffusers")
    assert found
    assert found.origin
    return Path(found.origin).parent


def defaults(function: ast.FunctionDef) -> dict[str, Any]:
    """Argument → default; what is no literal is `...`."""
    positional, spec = function.args.args, function.args
    pairs = [
        *zip(positional[len(positional) - len(spec.defaults) :], spec.defaults, strict=True),
        *((each, default) for each, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if default),
    ]
    found: dict[str, Any] = {}
    for each, default in pairs:
        try:
            found[each.arg] = ast.literal_eval(default)
        except ValueError:
            found[each.arg] = ...
    return found


def methods(name: str, method: str) -> Iterator[ast.FunctionDef]:
    """Those of this name of a class of diffusers' and, after it, of its bases."""
    known = _class(name)
    if known is None:
        return
    for each in known.body:
        if isinstance(each, ast.FunctionDef) and each.name == method:
            yield each
    for base in known.bases:
        if isinstance(base, ast.Name) and base.id != name:
            yield from methods(base.id, method)


def literal(name: str, attribute: str) -> Any:
    """The value of a class's attribute; None where it has none, or none that is a literal."""
    known = _class(name)
    for each in known.body if known else ():
        if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name) and each.targets[0].id == attribute:
            try:
                return ast.literal_eval(each.value)
            except ValueError:
                return None
    return None


@functools.cache
def _class(name: str) -> ast.ClassDef | None:
    path = files().get(name)
    if path is None:
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next((each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == name), None)


@functools.cache
def files() -> Mapping[str, Path]:
    """Class of diffusers' → the file that has it."""
    paths = [
        path
        for name in FOLDERS
        for path in ([root() / name] if name.endswith(".py") else (root() / name).rglob("*.py"))
    ]
    classes = re.compile(r"^class (\w+)", re.MULTILINE)
    return {name: path for path in paths for name in classes.findall(path.read_text(encoding="utf-8"))}


def json_of(path: Path) -> dict[str, Any]:
    """Empty where it is not there, or no object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
