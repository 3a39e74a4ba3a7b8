"""Which parked calls run next: one pure function over what is known about them, without torch.

Every active request has at most one call parked. The next forward goes to

1. a call that has waited `patience` forwards, the one waiting longest;
2. the highest priority;
3. the caller that has been given least so far;
4. the request with the fewest steps left, where that is known: short ones overtake long ones;
5. the one that has waited longest.

Others with an equal key join it in the same order, as long as there is room.

No call starves: with A active requests it runs at the latest in forward `patience + A` after it parked.
Once it has waited `patience` forwards only calls that parked earlier go first. There are at most A - 1 of
them, every forward takes the first of them away, and none is added.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

PATIENCE = 16
"""Forwards of others that a call lets pass at most, besides those of other calls as impatient as itself."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A parked call as the policy sees it."""

    id: int
    """Of its request; requests are numbered as they come."""
    key: Hashable
    """Calls with equal keys may share a forward; None: this one runs alone."""
    rows: int
    since: int
    """How many forwards had run when it parked."""
    priority: int = 0
    """Higher goes first."""
    caller: str = ""
    left: int | None = None
    """Denoising steps that its request still has to do."""


def choose(
    waiting: Sequence[Waiting],
    now: int,
    room: Callable[[Waiting], int],
    given: Callable[[str], float] = lambda caller: 0.0,
    patience: int = PATIENCE,
) -> list[Waiting]:
    """The calls of the next forward; the first of them decides which.

    `now`: forwards so far. `room`: rows that a forward of this kind may have; a call with more runs alone.
    `given`: what a caller has had so far, in rows.
    """

    def rank(call: Waiting) -> tuple[float, ...]:
        if now - call.since >= patience:
            return (0, call.since, call.id)
        left = float("inf") if call.left is None else call.left
        return (1, -call.priority, given(call.caller), left, call.since, call.id)

    if not waiting:
        return []
    ranked = sorted(waiting, key=rank)
    leader = ranked[0]
    group, rows = [leader], leader.rows
    if leader.key is None:
        return group
    limit = room(leader)
    for call in ranked[1:]:
        if call.key == leader.key and rows + call.rows <= limit:
            group.append(call)
            rows += call.rows
    return group
