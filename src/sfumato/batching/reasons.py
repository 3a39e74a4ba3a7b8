"""Why a module call was not batched: a small set of categories, for metrics. The log has the details."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Values of the label `reason` of `sfumato_unbatched_forwards_total`."""

    EXCLUSIVE = "exclusive"
    """Its pipeline changes shared modules while it runs, so it runs from start to end without switching."""
    CHANGED = "changed_module"
    """Its request has changed a module, or scaled its adapters, and has not restored it yet."""
    STATE = "torch_state"
    """Its request's torch state differs from the rest: autocast, gradients, default dtype."""
    ENDING = "ending"
    """Its request is being ended."""
    CACHE = "cache"
    """One of its arguments is a cache object, or the module keeps a cache per request."""
    TILED = "tiled"
    """Its VAE works in tiles, for this request only."""
    GENERATOR = "generator"
    """It draws its own random numbers."""
    LARGE = "large_tensor"
    """One of its arguments is a large tensor whose first dimension is not the rows."""
    STRUCTURE = "structure"
    """Another argument that cannot be joined."""
    ROWS = "max_batch"
    """It fills a forward pass by itself, by `max_batch` or because more rows did not fit into memory."""
    UNPROVEN = "unproven"
    """Independence of its rows could not be tested: it raised when the other rows were changed."""
    REFUSED = "refused"
    """Its rows are not independent, or a batch of its kind raised, or its output cannot be split."""
