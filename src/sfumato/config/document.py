"""YAML text -> plain mappings, with the line of each key and without silent duplicates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sfumato.config.readers import shorten
from sfumato.errors import ModelFileError

_CONSTRUCTION = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""What PyYAML raises: its own errors, and whatever `int`, `datetime` and others raise for a bad scalar."""


MAX_BYTES = 256 * 1024
"""Maximum size of a model file: PyYAML takes a second for it. Real ones are a few kilobytes."""
MAX_NODES = 50_000
"""Maximum values of a file after its aliases and merge keys are expanded."""
MAX_DEPTH = 32
MAX_KEY = 200
MAX_NUMBER = 400
"""Maximum characters of a scalar that is not text: parsing a number takes quadratic time."""

_TOO_DEEP = f"it is nested deeper than {MAX_DEPTH} levels, which no model file needs to be"
_MERGE = "tag:yaml.org,2002:merge"
_TEXT = "tag:yaml.org,2002:str"


@dataclass(frozen=True, slots=True)
class Document:
    """One mapping of a model file."""

    values: Mapping[str, Any]
    lines: Mapping[str, int]
    """`step`, `diffusers.cuda` -> line number from 1."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """The same -> a value as it is written: `3.50` and `no` can be names."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Limits the nesting depth; PyYAML itself would recurse until Python's stack overflows."""

    _depth = 0

    def scan_to_next_token(self) -> None:
        """Also over tabs behind a word, as other readers of YAML have it; a tab that indents stays an error."""
        super().scan_to_next_token()
        while self.peek() == "\t" and self.buffer[self.pointer - self.column : self.pointer].strip():
            self.forward()
            super().scan_to_next_token()

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=self.peek_event().start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def read(file: Path) -> str:
    """The text of a model file. Raises ModelFileError, and OSError when it cannot be read."""
    with file.open("rb") as opened:
        data = opened.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ModelFileError(f"{file}: is larger than {MAX_BYTES // 1024} KiB, which no model file needs to be")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None


def documents(text: str, file: Path) -> list[Document]:
    """The mappings of a file: one, or those of its list. Raises ModelFileError."""
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            raise ModelFileError(f"{file}: is empty; a model file has at least `parameters: {{model: ...}}`")
        _check_expanded_size(root, file)
        _check_keys(root, file)
        # One construction for all models: those of a list may share an anchor.
        value = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        raise ModelFileError(f"{file}{_line(error)}: not valid YAML: {error.problem or error.context}") from None
    except _CONSTRUCTION as error:
        raise ModelFileError(f"{file}: not valid YAML: {error}".splitlines()[0]) from None
    finally:
        if loader is not None:
            loader.dispose()
    nodes = root.value if isinstance(root, yaml.SequenceNode) else [root]
    values = value if isinstance(root, yaml.SequenceNode) else [value]
    if not values:
        raise ModelFileError(f"{file}: is an empty list; a model file has at least one model")
    return [_document(item, node, file) for item, node in zip(values, nodes, strict=True)]


def _document(value: Any, node: yaml.Node, file: Path) -> Document:
    if not isinstance(value, dict):
        line = node.start_mark.line + 1
        raise ModelFileError(f"{file}, line {line}: {shorten(value)} is not a model; `key: value` lines are needed")
    for key in value:
        if not isinstance(key, str):
            raise ModelFileError(f"{file}: the key {shorten(key)} is not text; put quotes around it")
    pairs = list(_pairs(node, depth=2))
    lines = {path: key.start_mark.line + 1 for path, key, _ in pairs}
    return Document(value, lines, {path: value.value for path, _, value in pairs if isinstance(value, yaml.ScalarNode)})


def _pairs(node: yaml.Node, depth: int, prefix: str = "") -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Dotted path, key and value of a mapping and those in it."""
    if depth and isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{prefix}{key.value}"
            yield path, key, value
            yield from _pairs(value, depth - 1, f"{path}.")


def _check_expanded_size(root: yaml.Node, file: Path) -> None:
    """Refuse documents that aliases blow up: the expanded tree may be exponentially larger than the text."""
    sizes: dict[int, int] = {}
    ancestors: set[int] = set()

    def size(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in sizes:
            location = f"{file}, line {node.start_mark.line + 1}"
            if id(node) in ancestors:
                raise ModelFileError(f"{location}: the node with this anchor contains itself; remove that alias")
            if len(ancestors) >= MAX_DEPTH:
                raise ModelFileError(f"{location}: {_TOO_DEEP}")
            ancestors.add(id(node))
            parts = (
                node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
            )
            sizes[id(node)] = 1 + sum(map(size, parts))
            ancestors.remove(id(node))
            if sizes[id(node)] > MAX_NODES:
                raise ModelFileError(
                    f"{location}: this expands to more than {MAX_NODES} values with its aliases; use fewer aliases"
                )
        return sizes[id(node)]

    size(root)


def _check_keys(root: yaml.Node, file: Path) -> None:
    """Refuse duplicate keys, of which PyYAML silently keeps the last, and keys or numbers that are absurdly long. Join
    surrogate pairs."""
    pending, visited = [root], set()
    while pending:
        node = pending.pop()
        if id(node) in visited:  # an alias may point back at its own parent
            continue
        visited.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            node.value = _characters(node, file)
        if isinstance(node, yaml.ScalarNode) and node.tag != _TEXT and len(node.value) > MAX_NUMBER:
            raise ModelFileError(
                f"{file}, line {node.start_mark.line + 1}: {shorten(node.value)} is too long for a number; "
                "put quotes around it if it is text"
            )
        if isinstance(node, yaml.SequenceNode):
            pending += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                pending += (key, value)
                if not isinstance(key, yaml.ScalarNode):
                    continue
                line = key.start_mark.line + 1
                if len(key.value) > MAX_KEY:
                    raise ModelFileError(f"{file}, line {line}: {shorten(key.value)} is too long for a key ({MAX_KEY})")
                if key.value in lines and key.tag != _MERGE:
                    raise ModelFileError(
                        f"{file}, line {line}: {key.value}: duplicate key, also in line {lines[key.value]}; remove one",
                        param=key.value,
                    )
                lines[key.value] = line


def _characters(node: yaml.ScalarNode, file: Path) -> str:
    """The text with each escaped surrogate pair as the character that it is in JSON. Raises ModelFileError."""
    text: str = node.value
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise ModelFileError(
            f"{file}, line {node.start_mark.line + 1}: {shorten(text)} has half a surrogate pair, which is no "
            "character; write the whole pair, or the character itself"
        ) from None


def _line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f", line {mark.line + 1}" if mark else ""
