"""Digest of the source text that a module computes with: a verdict about a class is valid while it stays the same.

A version is both too strict and too loose: most classes do not change in the next release of diffusers, and a
module may be third-party code. The digest covers every method of every class in the module (its blocks,
their attention processors, its adapters' layers) and the functions that these methods name. Inherited
loading and saving code is left out; so is torch, whose version is stored beside the digest.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import linecache
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch

APART = (
    "torch.", "builtins", "abc", "typing", "collections", "dataclasses", "enum", "functools", "huggingface_hub.",
    "diffusers.models.modeling_utils", "diffusers.models.auto_model", "diffusers.configuration_utils",
    "diffusers.loaders.", "diffusers.utils.", "diffusers.hooks.", "transformers.modeling_utils",
    "transformers.configuration_utils", "transformers.utils.", "transformers.integrations.", "transformers.generation.",
    "accelerate.",
)  # fmt: skip
"""Modules whose classes and functions load, save, move or decorate, but do not compute."""


def source_digest(module: torch.nn.Module) -> str:
    """32 hexadecimal digits for the source of `module`: equal for equal code, whatever its weights and sizes."""
    texts: set[str] = set()
    for kind in {kind for part in module.modules() for kind in _kinds(part)}:
        texts.update(_texts(kind))
    for part in module.modules():
        # A forward that replaces the class's own.
        for value in vars(part).values():
            if isinstance(value, FunctionType | MethodType) and not _is_apart(value.__module__):
                texts.update(_with_named(value))
    lines = sorted(hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in texts)
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _kinds(part: torch.nn.Module) -> Iterator[type]:
    """Classes used in the forward pass of `part` itself: its own, and those of the callables it holds."""
    yield type(part)
    for value in vars(part).values():
        if callable(value) and not isinstance(value, torch.nn.Module | FunctionType | MethodType | type):
            yield type(value)


@functools.cache
def _texts(kind: type) -> frozenset[str]:
    found: set[str] = set()
    for base in kind.__mro__:
        if _is_apart(base.__module__):
            continue
        for value in vars(base).values():
            if function := _function(value):
                found.update(_with_named(function))
    return frozenset(found)


def _function(value: Any) -> Callable[..., Any] | None:
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    return value if isinstance(value, FunctionType) else None


def _with_named(function: Callable[..., Any]) -> Iterator[str]:
    """The text of `function` and of the functions it calls by a global name, and the names of such classes."""
    function = inspect.unwrap(function)
    code: CodeType = function.__code__
    yield _text(code)
    for name in {name for each in _nested(code) for name in each.co_names}:
        named = function.__globals__.get(name)
        if isinstance(named, FunctionType) and not _is_apart(named.__module__):
            yield _text(inspect.unwrap(named).__code__)


def _text(code: CodeType) -> str:
    """The lines of a function, including decorators; its bytecode if it has no file."""
    lines = linecache.getlines(code.co_filename)
    last = max((end for each in _nested(code) for _, end, _, _ in each.co_positions() if end), default=0)
    if last <= len(lines) and last:
        return "".join(lines[code.co_firstlineno - 1 : last])
    return "".join(each.co_code.hex() + repr(each.co_names) for each in _nested(code))


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _is_apart(name: str | None) -> bool:
    return f"{name}.".startswith(tuple(f"{apart.rstrip('.')}." for apart in APART))
