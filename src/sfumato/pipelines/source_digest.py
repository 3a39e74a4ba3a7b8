"""Digest of the source text that a module computes with: a verdict about a class is valid while it stays the same.

A version is both too strict and too loose: most classes do not change in the next release of diffusers, and a
module may be third-party code. The digest covers every method of every class in the module (its blocks,
their attention processors, its adapters' layers) and the functions that these methods name, and those name in turn.
Inherited loading and saving code is left out; so is torch, whose version is stored beside the digest.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import linecache
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch

APART = (
    "torch.", "builtins", "abc", "typing", "collections", "dataclasses", "enum", "functools", "huggingface_hub.",
    "diffusers.models.modeling_utils", "diffusers.models.auto_model", "diffusers.configuration_utils",
    "diffusers.pipelines.pipeline_utils", "diffusers.loaders.", "diffusers.utils.", "diffusers.hooks.",
    "transformers.modeling_utils", "transformers.configuration_utils", "transformers.utils.",
    "transformers.integrations.", "transformers.generation.", "accelerate.",
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
                texts.update(_source_closure(value))
    return _digest(texts)


def class_digests(module: torch.nn.Module) -> dict[str, str]:
    """Path of each class in `module` → digest of its source, without classes that compute nothing.

    A `forward` that replaces the one of its class counts as a class.
    """
    digests: dict[str, str] = {}
    for part in module.modules():
        for kind in _kinds(part):
            if digest := class_digest(kind):
                digests[path(kind)] = digest
        for value in vars(part).values():
            if isinstance(value, FunctionType | MethodType) and not _is_apart(value.__module__):
                digests[f"{value.__module__}.{value.__qualname__}"] = _digest(_source_closure(value))
    return digests


@functools.cache
def class_digest(kind: type) -> str:
    """32 hexadecimal digits for the source of a class and its bases; empty if it computes nothing."""
    texts = _texts(kind)
    return _digest(texts) if texts else ""


def path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _digest(texts: Iterable[str]) -> str:
    lines = sorted({hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in texts})
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _kinds(part: torch.nn.Module) -> Iterator[type]:
    """Classes used in the forward pass of `part` itself: its own, and those of the callables it holds."""
    yield type(part)
    for value in vars(part).values():
        if callable(value) and not isinstance(value, torch.nn.Module | FunctionType | MethodType | type):
            yield type(value)


@functools.cache
def _texts(kind: type) -> frozenset[str]:
    texts: set[str] = set()
    for base in kind.__mro__:
        if _is_apart(base.__module__):
            continue
        for value in vars(base).values():
            if function := _function(value):
                texts.update(_source_closure(function))
    return frozenset(texts)


def _function(value: Any) -> Callable[..., Any] | None:
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    return value if isinstance(value, FunctionType) else None


def _source_closure(function: Callable[..., Any]) -> set[str]:
    """The text of `function`, of the functions that it calls by a global name, and of those that these call."""
    texts: dict[CodeType, str] = {}
    waiting = [inspect.unwrap(function)]
    while waiting:
        current: Any = waiting.pop()
        if current.__code__ in texts:
            continue
        texts[current.__code__] = _text(current.__code__)
        for name in {name for code in _nested(current.__code__) for name in code.co_names}:
            called = current.__globals__.get(name)
            if isinstance(called, FunctionType) and not _is_apart(called.__module__):
                waiting.append(inspect.unwrap(called))
    return set(texts.values())


def _text(code: CodeType) -> str:
    """The lines of a function, including decorators; its bytecode if it has no file."""
    lines = linecache.getlines(code.co_filename)
    last = max((end for nested in _nested(code) for _, end, _, _ in nested.co_positions() if end), default=0)
    if last <= len(lines) and last:
        return "".join(lines[code.co_firstlineno - 1 : last])
    return "".join(nested.co_code.hex() + repr(nested.co_names) for nested in _nested(code))


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _is_apart(name: str | None) -> bool:
    return f"{name}.".startswith(tuple(f"{apart.rstrip('.')}." for apart in APART))
