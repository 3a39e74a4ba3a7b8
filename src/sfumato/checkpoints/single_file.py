"""Find the repository that describes a single weight file, from the file's header and by diffusers' own rules.

The rules are a function in its source that reads only names and shapes. It is executed without its module, whose
import would import torch.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sfumato.checkpoints import weight_header
from sfumato.checkpoints.weight_header import Header
from sfumato.errors import SfumatoError
from sfumato.pipelines import syntax

log = logging.getLogger(__name__)

TYPE_OF = "infer_diffusers_model_type"
REPOSITORIES = "DIFFUSERS_DEFAULT_PIPELINE_PATHS"
OTHERWISE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""diffusers takes a file with none of the marks it knows for this one."""
NEEDED = ("CHECKPOINT_KEY_NAMES", REPOSITORIES, TYPE_OF)
"""Names of diffusers' `loaders/single_file_utils.py`."""


def described_by(path: Path) -> str | None:
    """The hub id of the repository with its configurations; None if the file cannot be read. Blocks."""
    try:
        status = path.stat()
        return _described_by(path, status.st_mtime_ns, status.st_size)
    except (OSError, SfumatoError):
        return None


@functools.lru_cache(maxsize=1024)
def _described_by(path: Path, modified_ns: int, size: int) -> str | None:
    return repository_of(weight_header.of_file(path))


def repository_of(header: Header) -> str | None:
    """The hub id of the repository that diffusers would take the configurations of such a file from, if any."""
    if not header.tensors:
        return None
    type_of, repositories = _rules()
    try:
        return str(repositories[type_of(header.tensors)]["pretrained_model_name_or_path"])
    except Exception as error:  # third-party code over an untrusted file
        log.debug("%r", error)
        return None


@functools.cache
def _rules() -> tuple[Callable[[Mapping[str, Any]], str], Mapping[str, Mapping[str, str]]]:
    """diffusers' function from names and shapes to a type, and its table from the type to a repository."""
    spec = importlib.util.find_spec("diffusers")
    assert spec
    assert spec.origin
    path = Path(spec.origin).parent / "loaders" / "single_file_utils.py"
    nodes = [node for node in syntax.parsed(path.read_text(encoding="utf-8")).body if _defines(node) in NEEDED]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(nodes, []), str(path), "exec"), names)
    return names[TYPE_OF], names[REPOSITORIES]


def _defines(node: ast.stmt) -> str:
    if isinstance(node, ast.FunctionDef):
        return node.name
    assigns = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    return node.targets[0].id if assigns else ""  # type: ignore[attr-defined]
