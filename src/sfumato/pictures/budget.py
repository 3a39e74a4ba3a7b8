"""Limit on the bytes of source pictures in memory, shared by all requests."""

from __future__ import annotations

from collections.abc import Callable

from sfumato.errors import RequestTooLarge, TooManyRequests


class Budget:
    """`limit` bytes for all requests. `retry_after` returns the seconds until some may be free."""

    def __init__(self, limit: int, retry_after: Callable[[], int]) -> None:
        self.limit = limit
        self.retry_after = retry_after
        self.used = 0

    def share(self, *, low: bool = False) -> Share:
        """`low`: a share of a request that must leave half of the budget to others."""
        return Share(self, self.limit // 2 if low else self.limit)


class Share:
    """One request's share of a budget, until it gives it back."""

    def __init__(self, budget: Budget, limit: int) -> None:
        self._budget = budget
        self._limit = limit
        self.used = 0

    def take(self, count: int) -> None:
        """Take `count` more bytes. Raises RequestTooLarge, or TooManyRequests if others hold the rest."""
        budget, limit = self._budget, self._limit
        half = "" if limit == budget.limit else ", of which requests of the priority batch may take half"
        most = f"{limit // 2**20} MiB of source pictures may be held at a time (the setting max_waiting_mb{half})"
        if self.used + count > limit:
            raise RequestTooLarge(
                f"image: at most {most}, but this request alone has more; send fewer or smaller ones", param="image"
            )
        if budget.used + count > limit:
            raise TooManyRequests(
                f"image: at most {most}, and other requests hold them now. Try again later.",
                retry_after=budget.retry_after(),
                param="image",
            )
        self.count(count)

    def count(self, count: int) -> None:
        """Count bytes that are in memory already, even beyond the limit."""
        self.used += count
        self._budget.used += count

    def give_back(self) -> None:
        """Release everything. May be called more than once."""
        self._budget.used -= self.used
        self.used = 0
