"""Choose the variant of a repository's weights: `unet/model.fp16.safetensors` is of the variant fp16."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

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
