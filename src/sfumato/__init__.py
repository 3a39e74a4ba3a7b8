"""Sfumato: a self-hosted image server on Hugging Face diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.batching.gather import gather as gather

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # `sfumato.gather` needs torch; the API process imports this package and must not.
    if name != "gather":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sfumato.batching.gather import gather

    return gather
