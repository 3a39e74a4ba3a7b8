"""The half precision that a family of models is made for: bfloat16 or float16.

Both take two bytes, but float16 ends at 65504, and the activations of most transformers trained in bfloat16 exceed
it: the picture turns black. diffusers' own examples say which one a denoiser is used with, so nothing has to be listed
here, and a family that a new diffusers brings is known on the day.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from sfumato.checkpoints import diffusers_source

DTYPES: Mapping[str, str] = {"bfloat16": "bf16", "float16": "fp16"}

_PART = re.compile(r"(?:unconditional_)?(?:transformer|unet|prior|decoder|denoiser)(?:_\w+)?")

_ANNOTATED = re.compile(r"^\s+(\w+): ([^=\n]*)", re.MULTILINE)
"""A parameter of a constructor, and its classes."""

_EXAMPLE = re.compile(r"^\s+(?:>>>|\.\.\.).*dtype=torch\.(bfloat16|float16)", re.MULTILINE)

_LANGUAGE_MODEL = re.compile(r"T5|Gemma|Qwen|Llama|GLM|Mistral|SmolLM|Ministral")
"""Text encoders that are language models. Their activations do not fit float16 either."""


def is_denoiser(name: str) -> bool:
    """Whether a component of this name denoises, and has most of the weights."""
    return bool(_PART.fullmatch(name))


def computes(name: str) -> bool:
    """Whether a component of this name takes the time of a picture."""
    return is_denoiser(name) or name == "vae" or name.startswith("text_encoder")


def is_language_model(name: str, cls: str) -> bool:
    """Whether a component is a text encoder as large as a language model, by its name and class."""
    return "text_encoder" in name and bool(_LANGUAGE_MODEL.search(cls))


def made_for(pipeline: str | None, index: Mapping[str, Any]) -> str:
    """`bf16` or `fp16`, for a repository with this `model_index.json` (may be empty) and pipeline class."""
    parts = [(name, str(value[1])) for name, value in index.items() if isinstance(value, list)]
    if not parts and pipeline and (path := diffusers_source.files().get(pipeline)):
        parts = _parts(path.read_text(encoding="utf-8"))
    votes = sum((_votes().get(cls, Counter()) for name, cls in parts if is_denoiser(name)), Counter[str]())
    if votes:
        return "fp16" if votes["fp16"] > votes["bf16"] else "bf16"
    return "bf16" if any(is_language_model(name, cls) for name, cls in parts) else "fp16"


@functools.cache
def draws_without_bf16(pipeline: str) -> bool:
    """Whether a pipeline class hands its pictures to numpy, which has no bfloat16, as they are (DDPM and others)."""
    calls = (
        ast.unparse(node)
        for function in diffusers_source.methods(pipeline, "__call__")
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "numpy"
    )
    return any("permute(0, 2, 3, 1)" in call and ".float()" not in call for call in calls)


@functools.cache
def _votes() -> Mapping[str, Counter[str]]:
    """Class of a denoiser → how many of diffusers' pipelines use it with which precision in their examples."""
    votes: dict[str, Counter[str]] = {}
    for path in {path for name, path in diffusers_source.files().items() if name.endswith("Pipeline")}:
        text = path.read_text(encoding="utf-8")
        precisions = {DTYPES[name] for name in _EXAMPLE.findall(text)}
        for denoiser in {cls for name, cls in _parts(text) if is_denoiser(name)}:
            votes.setdefault(denoiser, Counter()).update(precisions)
    return votes


def _parts(text: str) -> list[tuple[str, str]]:
    """The parameters of a pipeline's constructor that are components, with each class that they may have."""
    return [(name, cls) for name, classes in _ANNOTATED.findall(text) for cls in re.findall(r"\b[A-Z]\w+", classes)]
