"""A VAE that works in tiles for one request: a large picture piece by piece, in a fraction of the memory.

Where tiles meet the pixels differ a little, so it belongs to a request: others on the same VAE have none of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAME = "vae"
"""Of the component that can do it."""


def can_tile(pipeline: Any) -> bool:
    return hasattr(getattr(pipeline, NAME, None), "enable_tiling")


@contextmanager
def tiled(vae: Any) -> Iterator[None]:
    """While entered, `vae` works in tiles, and a picture at a time; afterwards as before."""
    before = dict(vars(vae))
    try:
        for enable in ("enable_slicing", "enable_tiling"):
            if hasattr(vae, enable):
                getattr(vae, enable)()
        yield
    finally:
        for name, value in list(vars(vae).items()):
            if name not in before:
                delattr(vae, name)
            elif before[name] is not value:
                setattr(vae, name, before[name])
