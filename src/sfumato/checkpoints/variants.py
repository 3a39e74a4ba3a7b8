"""Choose the variant of a repository's weights: `unet/model.fp16.safetensors` is of the variant fp16."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence

from sfumato.config import ModelConfig

log = logging.getLogger(__name__)

_WEIGHTS = re.compile(
    r"(?P<part>[^/]+)/(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<variant>[A-Za-z0-9_]+))?"
    r"(?:-\d{5}-of-\d{5})?(?:\.(?P<later>[A-Za-z0-9_]+))?\.(?:safetensors|bin)"
)
"""Older files have the variant after the shard's number."""

DEFAULT_ORDER = (None, "fp16", "bf16", "fp32")
"""Order in which the other variants are tried."""


def of(file: str) -> str | None:
    """The variant of a weight file, `folder/name`; None if it has none."""
    match = _WEIGHTS.fullmatch(file)
    return (match["variant"] or match["later"]) if match else None


def pick(files: Iterable[str], preferred: Sequence[str | None]) -> str | None:
    """The first of `preferred` that every component has (a component without it has plain weights), else any other."""
    variants: dict[str, set[str | None]] = {}
    for file in files:
        if match := _WEIGHTS.fullmatch(file):
            variants.setdefault(match["part"], set()).add(match["variant"] or match["later"])
    names = {name for each in variants.values() for name in each}
    others = [*DEFAULT_ORDER, *sorted(name for name in names if name)]
    for variant in (*preferred, *others):
        if variant in names and all(each & {variant, None} if variant else None in each for each in variants.values()):
            return variant
    return preferred[-1]


def preferred(config: ModelConfig, dtype: str) -> tuple[str | None, ...]:
    """Variants in order of preference. For a half-precision model fp16 files are enough, and half the download."""
    if config.variant:
        return (config.variant,)
    return (None,) if dtype == "fp32" else ("fp16", None)


def choose(config: ModelConfig, dtype: str, files: Iterable[str]) -> str | None:
    """The variant of a repository's files to load; logs a warning if it is not a preferred one."""
    wanted = preferred(config, dtype)
    variant = pick(files, wanted)
    if variant not in wanted:
        log.warning(
            "%s: there are no %s weights; the variant %s is loaded, in %s",
            config.name, wanted[0] or "plain", variant or "without a name", dtype,
        )  # fmt: skip
    return variant
