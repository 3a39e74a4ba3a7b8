"""The key `context_parallel`: which models diffusers can divide between devices, told before weights are read."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sfumato.checkpoints import diffusers_source, split
from sfumato.config import ModelConfig
from sfumato.errors import ModelFileError
from sfumato.models import precision

KEY = "diffusers.context_parallel"

PLAN = "_cp_plan"
"""Attribute of a class that diffusers can divide: where its sequence is split and put together again."""

CONFLICTS: Mapping[str, Callable[[ModelConfig], object]] = {
    "offload": lambda config: config.offload in ("model", "group") or config.low_vram,
    "quantization": lambda config: config.quantization or split.is_gguf(config),
    "layerwise_casting": lambda config: config.layerwise_casting,
    "cache": lambda config: config.cache,
}
"""What changes a module's tensors or its forward pass on one device: the others would compute something else."""


def check(config: ModelConfig, index: Mapping[str, Any]) -> None:
    """Raises ModelFileError if it cannot be. `index`: the `model_index.json`, empty if it is not known yet."""
    if not config.context_parallel:
        return
    if others := [key for key, is_set in CONFLICTS.items() if is_set(config)]:
        raise _refused(config, f"it does not go together with {', '.join(others)}; leave one of them out")
    classes = {part: str(value[1]) for part, value in index.items() if _is_denoiser(part, value)}
    if classes and not any(_has_plan(name) for name in classes.values()):
        told = ", ".join(f"{part} {name}" for part, name in classes.items())
        raise _refused(config, f"diffusers has no plan to divide its {told}; leave the key out")


def check_loaded(config: ModelConfig, pipeline: Any) -> None:
    """Raises ModelFileError if none of the pipeline's denoisers can be divided between so many devices."""
    if not config.context_parallel:
        return
    denoisers = {
        name: part for name, part in vars(pipeline).items() if precision.is_denoiser(name) and part is not None
    }
    if not any(getattr(part, PLAN, None) for part in denoisers.values()):
        names = ", ".join(f"{name} {type(part).__name__}" for name, part in denoisers.items())
        raise _refused(config, f"diffusers has no plan to divide its {names or 'denoiser: it has none'}")
    for name, heads in _heads(denoisers):
        if heads % config.context_parallel:
            raise _refused(config, f"the {heads} attention heads of its {name} cannot be divided by it")


def _heads(denoisers: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, part in denoisers.items():
        if isinstance(heads := getattr(getattr(part, "config", None), "num_attention_heads", None), int):
            yield name, heads


def _is_denoiser(part: str, value: object) -> bool:
    return precision.is_denoiser(part) and isinstance(value, list | tuple) and len(value) > 1 and bool(value[1])


def _has_plan(name: str) -> bool:
    """Whether a class has one; so it is taken if it is not diffusers' own, until it is loaded."""
    value = diffusers_source.assigned(name, PLAN)
    return value is None or not (isinstance(value, ast.Constant) and value.value is None)


def _refused(config: ModelConfig, why: str) -> ModelFileError:
    return ModelFileError(f"{config.name}: {KEY}: {config.context_parallel}: {why}", param=KEY)
