"""Which pipeline classes can draw with a feature cache in their transformer, from their source as text.

A feature cache skips layers whose output changes little from one step to the next. It keeps a state per kind of call
(with the prompt, without it), so a class must say which kind each call is (`transformer.cache_context`).
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from typing import Any

from sfumato.checkpoints import diffusers_source
from sfumato.config import ModelConfig
from sfumato.errors import ModelFileError

DENOISER = "transformer"
CONTEXT = "cache_context"
MIXIN = "CacheMixin"


@functools.cache
def says_its_calls(name: str) -> bool:
    """Whether a pipeline class says of each call of its transformer which kind it is."""
    calls = list(diffusers_source.methods(name, "__call__"))[:1]
    return any(isinstance(node, ast.Attribute) and node.attr == CONTEXT for call in calls for node in ast.walk(call))


def check(config: ModelConfig, name: str, index: Mapping[str, Any]) -> None:
    """Raises ModelFileError for a `cache` that cannot work with the pipeline class `name`.

    `index`: the `model_index.json`, empty if not known yet.
    """
    if config.cache is None:
        return
    denoiser = index.get(DENOISER)
    if not says_its_calls(name) or (isinstance(denoiser, list) and not _takes_cache(str(denoiser[1]))):
        raise refusal(config, f"diffusers caches no features of {name}")


def refusal(config: ModelConfig, why: str) -> ModelFileError:
    return ModelFileError(f"{config.name}: cache: {config.cache}: {why}; leave it out", param="cache")


def _takes_cache(name: str) -> bool:
    return MIXIN in diffusers_source.ancestors(name)
