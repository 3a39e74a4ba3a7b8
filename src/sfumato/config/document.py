"""YAML text -> plain mappings, with the line of each key and without silent duplicates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sfumato.config.readers import shown
from sfumato.errors import ModelFileError

_CONSTRUCTION = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What PyYAML raises: besides its own errors whatever `int`, `datetime` and friends make of a bad scalar."""


@dataclass(frozen=True, slots=True)
class Document:
    """One mapping of a model file."""

    values: Mapping[str, Any]
    lines: Mapping[str, int]
    """`step`, `diffusers.cuda` -> line number from 1."""


def read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None
    except OSError as error:
        raise ModelFileError(f"{file}: cannot be read: {error.strerror}") from None


def documents(text: str, file: Path) -> list[Document]:
    """The mappings of a file: one, or those of its list. Raises ModelFileError."""
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise ModelFileError(f"{file}: is empty; a model file has at least `parameters: {{model: ...}}`")
        _no_duplicates(root, file)
        # One construction for all: an anchor may be shared between the models of a list.
        value = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        raise ModelFileError(f"{file}{_line(error)}: not valid YAML: {error.problem or error.context}") from None
    except _CONSTRUCTION as error:
        raise ModelFileError(f"{file}: not valid YAML: {error}".splitlines()[0]) from None
    finally:
        if loader is not None:
            loader.dispose()
    nodes = root.value if isinstance(root, yaml.SequenceNode) else [root]
    found = value if isinstance(root, yaml.SequenceNode) else [value]
    if not found:
        raise ModelFileError(f"{file}: is an empty list; a model file has at least one model")
    return [_document(item, node, file) for item, node in zip(found, nodes, strict=True)]


def _document(value: Any, node: yaml.Node, file: Path) -> Document:
    if not isinstance(value, dict):
        line = node.start_mark.line + 1
        raise ModelFileError(f"{file}, line {line}: {shown(value)} is not a model; `key: value` lines are needed")
    for key in value:
        if not isinstance(key, str):
            raise ModelFileError(f"{file}: the key {shown(key)} is not text; put quotes around it")
    return Document(value, _lines(node, depth=2))


def _lines(node: yaml.Node, depth: int, prefix: str = "") -> dict[str, int]:
    lines: dict[str, int] = {}
    if depth and isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{prefix}{key.value}"
            lines[path] = key.start_mark.line + 1
            lines |= _lines(value, depth - 1, f"{path}.")
    return lines


def _no_duplicates(root: yaml.Node, file: Path) -> None:
    """PyYAML lets the last of two equal keys win; whoever wrote both did not mean that."""
    waiting, known = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in known:  # an alias may point back at what holds it
            continue
        known.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                waiting += (key, value)
                if not isinstance(key, yaml.ScalarNode):
                    continue
                line = key.start_mark.line + 1
                if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                    raise ModelFileError(
                        f"{file}, line {line}: {key.value}: stands here and in line {seen[key.value]}; remove one",
                        param=key.value,
                    )
                seen[key.value] = line


def _line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f", line {mark.line + 1}" if mark else ""
