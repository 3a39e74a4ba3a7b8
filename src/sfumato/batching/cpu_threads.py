"""Temporary CPU threads: `torch.set_num_threads` is per process, but `threads` in a model file is per model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def using(count: int) -> Iterator[None]:
    """Use `count` threads inside the context, then as many as before."""
    before = torch.get_num_threads()
    if count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
