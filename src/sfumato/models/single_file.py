"""Find the repository that describes a single weight file, from the file's header and by diffusers' own rules.

The rules are a function in its source that reads only names and shapes. It is executed without its module, whose
import would import torch.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

log = logging.getLogger(__name__)

MAX_HEADER = 16 * 2**20
"""In bytes. A model of ten thousand tensors has a header of one MiB."""

TYPE_OF = "infer_diffusers_model_type"
REPOSITORIES = "DIFFUSERS_DEFAULT_PIPELINE_PATHS"
NEEDED = ("CHECKPOINT_KEY_NAMES", REPOSITORIES, TYPE_OF)
"""Names of diffusers' `loaders/single_file_utils.py`."""


def described_by(path: Path) -> str | None:
    """The hub id of the repository with its configurations; None if the file cannot be read. Blocks."""
    try:
        status = path.stat()
        return _described_by(path, status.st_mtime_ns, status.st_size)
    except (OSError, ValueError, RecursionError):
        return None


@functools.lru_cache(maxsize=1024)
def _described_by(path: Path, modified_ns: int, size: int) -> str | None:
    entries = header_of(path).items()
    shapes = {
        name: SimpleNamespace(shape=each["shape"]) for name, each in entries if isinstance(each.get("shape"), list)
    }
    if not shapes:
        return None
    type_of, repositories = _rules()
    try:
        return str(repositories[type_of(shapes)]["pretrained_model_name_or_path"])
    except Exception as error:  # third-party code over an untrusted file
        log.debug("%s: %r", path, error)
        return None


def header_of(path: Path) -> Mapping[str, Any]:
    """Header of a safetensors file: name → dtype, shape and offsets. Raises ValueError if it is not such a file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"{path} has no header of safetensors")
        header = json.loads(file.read(length))
    if not (isinstance(header, dict) and all(isinstance(entry, dict) for entry in header.values())):
        raise ValueError(f"{path} has no header of safetensors")
    return header


@functools.cache
def _rules() -> tuple[Callable[[Mapping[str, Any]], str], Mapping[str, Mapping[str, str]]]:
    """diffusers' function from names and shapes to a type, and its table from the type to a repository."""
    spec = importlib.util.find_spec("diffusers")
    assert spec
    assert spec.origin
    path = Path(spec.origin).parent / "loaders" / "single_file_utils.py"
    nodes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if _defines(node) in NEEDED]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(nodes, []), str(path), "exec"), names)
    return names[TYPE_OF], names[REPOSITORIES]


def _defines(node: ast.stmt) -> str:
    if isinstance(node, ast.FunctionDef):
        return node.name
    assigns = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    return node.targets[0].id if assigns else ""  # type: ignore[attr-defined]
