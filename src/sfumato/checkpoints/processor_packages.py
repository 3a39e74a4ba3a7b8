"""Packages that a model's processors need: transformers reads videos with torchvision alone.

Read from transformers' source as text; a processor that could read videos is not made without it, whatever it is for.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfumato.pipelines import syntax

OF_VIDEOS = "video_processor"
"""A parameter of such processors."""


def of(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Packages for the processors in a repository's index."""
    listed = any(each.endswith("Processor") and each in _of_videos() for each in _listed(index))
    return ("torchvision",) if listed else ()


def _listed(index: Mapping[str, Any]) -> Iterator[str]:
    """Classes of transformers in a `model_index.json`, or in a modular one, where a third part may say them."""
    for value in index.values():
        if isinstance(value, list) and len(value) > 1:
            hint = value[2].get("type_hint") if len(value) > 2 and isinstance(value[2], dict) else None
            library, cls = value[:2] if value[1] else (hint if isinstance(hint, list) and len(hint) == 2 else ("", ""))
            if library == "transformers":
                yield str(cls)


@functools.cache
def _of_videos() -> frozenset[str]:
    """transformers' processors that take a video processor."""
    spec = importlib.util.find_spec("transformers")  # does not import it
    assert spec
    assert spec.origin
    found = set()
    for path in (Path(spec.origin).parent / "models").glob("*/processing_*.py"):
        text = path.read_text(encoding="utf-8")
        if OF_VIDEOS in text:
            for node in syntax.parsed(text).body:
                if isinstance(node, ast.ClassDef) and _takes_video_processor(node):
                    found.add(node.name)
    return frozenset(found)


def _takes_video_processor(definition: ast.ClassDef) -> bool:
    return any(
        isinstance(node, ast.FunctionDef)
        and node.name == "__init__"
        and any(argument.arg == OF_VIDEOS for argument in node.args.args)
        for node in definition.body
    )
