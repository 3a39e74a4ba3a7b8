"""Which variant of a repository's weights is loaded: `unet/model.fp16.safetensors` is of the variant fp16."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_WEIGHTS = re.compile(
    r"(?P<part>[^/]+)/(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<variant>[A-Za-z0-9_]+))?"
    r"(?:-\d{5}-of-\d{5})?(?:\.(?P<later>[A-Za-z0-9_]+))?\.(?:safetensors|bin)"
)
"""Older files have the variant behind the number of the shard."""

USUAL = (None, "fp16", "bf16", "fp32")
"""What is taken first of those that nobody has asked for."""


def pick(files: Iterable[str], wanted: Sequence[str | None]) -> str | None:
    """The first of `wanted` that every component has (a component without it has plain weights), else any other."""
    found: dict[str, set[str | None]] = {}
    for file in files:
        if match := _WEIGHTS.fullmatch(file):
            found.setdefault(match["part"], set()).add(match["variant"] or match["later"])
    names = {name for each in found.values() for name in each}
    others = [*USUAL, *sorted(name for name in names if name)]
    for variant in (*wanted, *others):
        if variant in names and all(each & {variant, None} if variant else None in each for each in found.values()):
            return variant
    return wanted[-1]
