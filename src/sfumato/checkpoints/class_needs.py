"""Components that a pipeline class can be without, and what it cannot take then; from its source as text."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from sfumato.checkpoints import diffusers_source
from sfumato.pipelines.inputs import LAST, Reading

Lacks: TypeAlias = Callable[[str], bool]
"""Whether a model has no component of this name; False if that is not known."""

ENCODE = "encode_"
"""Methods of pipelines that hand an argument to its encoder begin so."""

TEXT = "text_encoder"


def on_parts(reading: Reading, lacks: Lacks) -> Reading:
    """The reading without what the missing components are for; with `lacks` set if nothing is left of it."""
    encoders = text_encoders(reading.name)
    if reading.takes_prompt and encoders and all(map(lacks, encoders)):
        return replace(reading, lacks=" and ".join(encoders))
    missing = {
        each.name: " and ".join(absent)
        for each in reading.inputs
        if (absent := sorted(filter(lacks, needs(reading.name).get(each.name, ()))))
    }
    required = [missing[each.name] for each in reading.inputs if each.required and each.name in missing]
    kept = tuple(each for each in reading.inputs if each.name not in missing)
    return replace(reading, inputs=kept, lacks=" and ".join(required))


Settings: TypeAlias = Callable[[str, str], Any]
"""The value of a component's setting, of the pipeline's own with an empty name; None if there is none."""


def on_weights(reading: Reading, setting: Settings) -> Reading:
    """The reading with the last frame as the weights have it: Wan 2.2 with a time per token passes over it, and a
    denoiser that looks at pictures has places for the first one alone, or for both and no fewer.
    """
    sees, places = setting("transformer", "image_dim"), setting("transformer", "pos_embed_seq_len")
    taken = not setting("", "expand_timesteps") and (sees is None or places is not None)
    inputs = (
        replace(each, required=each.required or places is not None) if each.role == LAST else each
        for each in reading.inputs
        if taken or each.role != LAST
    )
    return replace(reading, inputs=tuple(inputs))


@functools.cache
def text_encoders(name: str) -> tuple[str, ...]:
    """The parameters of a class's constructor that are text encoders."""
    for function in diffusers_source.methods(name, "__init__"):
        return tuple(each.arg for each in function.args.args if each.arg.startswith(TEXT))
    return ()


@functools.cache
def needs(name: str) -> Mapping[str, frozenset[str]]:
    """Parameter of a class's call -> optional components that encode it."""
    found: dict[str, set[str]] = {}
    optional = _optional(name)
    for call in diffusers_source.methods(name, "__call__"):
        for node in _unconditional(call):
            for parameter, method in _passed(node):
                inner, parts = _inner(name, method)
                encoders = {parts.get(each, each) for each in needs(inner).get(parameter, ())} if inner else set()
                encoders |= set(_used(name, method)) if method.startswith(ENCODE) else set()
                found.setdefault(parameter, set()).update(encoders & optional)
        break
    return {parameter: frozenset(encoders) for parameter, encoders in found.items() if encoders}


def _optional(name: str) -> set[str]:
    listed = set(diffusers_source.literal(name, "_optional_components") or ())
    for function in diffusers_source.methods(name, "__init__"):
        return listed | {part for part, default in diffusers_source.defaults(function).items() if default is None}
    return listed


def _unconditional(call: ast.FunctionDef) -> Iterator[ast.Call]:
    """Calls of own methods, without those that depend on a component's configuration: it knows what it is made for."""
    configured = {
        id(node)
        for test in ast.walk(call)
        if isinstance(test, ast.If) and ".config." in ast.unparse(test.test)
        for node in ast.walk(test)
    }
    for node in ast.walk(call):
        if isinstance(node, ast.Call) and id(node) not in configured:
            yield node


def _passed(call: ast.Call) -> Iterator[tuple[str, str]]:
    """(argument, method) for each argument of `self.method(name=argument)` that is passed under its own name."""
    match call.func:
        case ast.Attribute(value=ast.Name(id="self"), attr=method):
            names = [*call.args, *(each.value for each in call.keywords)]
            yield from ((each.id, method) for each in names if isinstance(each, ast.Name))


def _used(name: str, method: str) -> Iterator[str]:
    """Attributes that a method calls, other than those that it asks for first."""
    for function in diffusers_source.methods(name, method):
        tests = "\n".join(ast.unparse(each.test) for each in ast.walk(function) if isinstance(each, ast.If | ast.IfExp))
        for node in ast.walk(function):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=part)) if f"self.{part}" not in tests:
                    yield part
        return


@functools.cache
def inner_pipelines(name: str) -> Mapping[str, str]:
    """Attribute -> class of each pipeline that another makes in its constructor."""
    return {attribute: kind for attribute, kind, _ in _made(name)}


def _inner(name: str, attribute: str) -> tuple[str, dict[str, str]]:
    """The class of a pipeline within this one, and its components -> those of this one; empty if there is none."""
    return next(((kind, parts) for made, kind, parts in _made(name) if made == attribute), ("", {}))


def _made(name: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    for function in diffusers_source.methods(name, "__init__"):
        for node in ast.walk(function):
            match node:
                case ast.Assign(
                    targets=[ast.Attribute(value=ast.Name(id="self"), attr=attribute)],
                    value=ast.Call(func=ast.Name(id=kind), keywords=given),
                ) if kind.endswith("Pipeline"):
                    parts = {each.arg: each.value.id for each in given if each.arg and isinstance(each.value, ast.Name)}
                    yield attribute, kind, parts
