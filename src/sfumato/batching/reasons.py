"""Why a module call shared no forward: a small set of words, for counting. The details are in the log."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Values of the label `reason` of `sfumato_unbatched_forwards_total`."""

    EXCLUSIVE = "exclusive"
    """Its pipeline changes shared modules while it runs, and so runs from start to end without a switch."""
    CHANGED = "changed_module"
    """Its request has changed a module for itself, or scaled its adapters, and has not put it back yet."""
    STATE = "torch_state"
    """Its request is in another state of torch than the rest: autocast, gradients, another default dtype."""
    ENDING = "ending"
    """Its request is being ended."""
    CACHE = "cache"
    """A cache object is among its arguments, or the module keeps a cache per request."""
    TILED = "tiled"
    """Its VAE works in tiles, for this request alone."""
    GENERATOR = "generator"
    """It draws its own random numbers."""
    LARGE = "large_tensor"
    """A large tensor among its arguments that does not have the rows first."""
    STRUCTURE = "structure"
    """Something else among its arguments that nobody knows how to join."""
    ROWS = "max_batch"
    """It has as many rows as a forward may have, by `max_batch` or because more did not fit into memory."""
    UNPROVEN = "unproven"
    """Whether its rows are independent could not be shown: it raised when the rows beside it were changed."""
    REFUSED = "refused"
    """Its rows are not independent, or a batch of its kind raised, or its output cannot be cut."""
