"""A model pool without a loop: who waits for a load waits until the thread that loads has news."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from sfumato.residency.pool import ModelPool
from sfumato.status import ModelStatus

_news = threading.Event()


def turn() -> None:
    """For one that waits, where no other request runs and nobody is in the way."""
    assert _news.wait(120), "nothing happens any more"
    _news.clear()


def pool(
    limit: int, on_status: Callable[[str, ModelStatus], None] = lambda *_: None, device: str = "cpu", **more: Any
) -> ModelPool:
    return ModelPool(limit, device, on_status, wake=_news.set, **more)
