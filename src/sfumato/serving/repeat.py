"""What chance and the clock decide of a request that may have to be drawn again: decided once, and stored with it.

The server carries out a stored request inside `CURRENT.set(...)`. Tasks inherit it, so it reaches every place that
would otherwise draw lots: the seed, the names of stored pictures, the time, and the model that its caller had selected.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sfumato.core import Recipe

if TYPE_CHECKING:
    from sfumato.serving.job import Job


@dataclass(slots=True)
class Repeatable:
    """One stored request, while it is carried out."""

    secret: str
    """32 random hexadecimal digits, which decide all that would be random."""
    created: float
    """When it was accepted, in seconds since 1970."""
    selected: str | None = None
    """The model that its caller had selected (AUTOMATIC1111's clients do)."""
    checked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when nothing is wrong with it that can be known without a download, or its model in memory."""
    job: Job | None = None
    """Its job, once it stands in the queue."""
    submitted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when `job` is."""
    unread: bool = False
    """Whether the database has not given what the request names; it may when it is asked again."""

    def submit(self, job: Job) -> None:
        self.job = job
        self.submitted.set()

    @property
    def seed(self) -> int:
        return int(self.secret[:8], 16)

    def picture_digits(self, recipe: Recipe, count: int) -> str:
        """Hexadecimal digits, at most 64, for the name of a picture: the same each time it is drawn."""
        parts = (self.secret, str(recipe.seed), recipe.prompt)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:count]


CURRENT: ContextVar[Repeatable | None] = ContextVar("repeatable", default=None)
"""The stored request that this task carries out; None for others."""


def seed() -> int:
    """A random seed, small enough for every client's number type; of a stored request always the same."""
    stored = CURRENT.get()
    return stored.seed if stored else secrets.randbelow(2**32)


def now() -> float:
    """The time at which a request was accepted, in seconds since 1970."""
    stored = CURRENT.get()
    return stored.created if stored else time.time()


def set_checked() -> None:
    """Nothing is wrong with a stored request that can be known without a download, or its model in memory."""
    if stored := CURRENT.get():
        stored.checked.set()


def set_unread() -> None:
    """The database has not given what a stored request names."""
    if stored := CURRENT.get():
        stored.unread = True
