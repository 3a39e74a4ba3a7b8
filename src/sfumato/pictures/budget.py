"""How many bytes of source pictures may be held at a time, and by whom."""

from __future__ import annotations

from collections.abc import Callable

from sfumato.errors import RequestTooLarge, TooManyRequests


class Budget:
    """`limit` bytes for all requests. `retry_after` says in how many seconds some may be free."""

    def __init__(self, limit: int, retry_after: Callable[[], int]) -> None:
        self.limit = limit
        self.retry_after = retry_after
        self.used = 0

    def share(self) -> Share:
        return Share(self)


class Share:
    """What one request holds of a budget, until it gives it back."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.used = 0

    def take(self, count: int) -> None:
        """So many bytes more. Raises RequestTooLarge, or TooManyRequests where others hold the rest."""
        budget = self._budget
        most = f"{budget.limit // 2**20} MiB of source pictures are held at a time (the setting max_waiting_mb)"
        if self.used + count > budget.limit:
            raise RequestTooLarge(f"image: at most {most}, and this request alone has more", param="image")
        if budget.used + count > budget.limit:
            raise TooManyRequests(
                f"image: at most {most}, and those of other requests wait already. Try again later.",
                retry_after=budget.retry_after(),
                param="image",
            )
        self.count(count)

    def count(self, count: int) -> None:
        """What is there already, whatever the limit says: less is left for others."""
        self.used += count
        self._budget.used += count

    def give_back(self) -> None:
        """All of it. May be called again."""
        self._budget.used -= self.used
        self.used = 0
