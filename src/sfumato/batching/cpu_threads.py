"""CPU threads for a while: `torch.set_num_threads` is the process's, but `threads` in a model file the model's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def using(count: int) -> Iterator[None]:
    """`count` threads while entered, then as many as before."""
    before = torch.get_num_threads()
    if count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
