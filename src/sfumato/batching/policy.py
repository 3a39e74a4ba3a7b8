"""Which parked calls run next: one pure function over what is known about them, without torch.

Every active request has at most one call parked. The next forward goes to

1. a call that has waited `patience` forwards, the one waiting longest;
2. the caller that has been given least so far;
3. the request with the fewest steps left, where that is known: short ones overtake long ones;
4. what is called once, text encoders and decoders, and of that what most others are like;
5. the one that has waited longest.

Others with an equal key join it in the same order, as long as there is room.

Requests that call several modules in each step can be out of phase, one group at the ControlNet while another
is at the UNet, and taking turns would keep them so for ever. So a leader whose batch has room left lets others
go first if they are on their way to it (`Waiting.loop`), are more than its batch has, or as many and were the
last to move: the group that moves goes on moving, comes by, and from then on they run together. That costs the
leader a step's worth of forwards at most, as a rule, and it is no more than its patience.

No call starves: with A active requests it runs at the latest in forward `patience + A` after it parked.
Once it has waited `patience` forwards it lets nobody go first, and only calls that parked earlier lead. There are
at most A - 1 of them, every forward takes the first of them away, and none is added.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence, Set
from dataclasses import dataclass

PATIENCE = 16
"""Forwards of others that a call lets pass at most, besides those of other calls as impatient as itself."""

LONGEST_LOOP = 64
"""Calls of one step that are looked at: ten ControlNets and a denoiser for each of five conditions are 55."""


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
    caller: str = ""
    left: int | None = None
    """Denoising steps that its request still has to do."""
    loop: Set[Hashable] = frozenset()
    """Keys that its request calls over and over, as far as is known: it will come by there."""


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
    alike: dict[Hashable, list[Waiting]] = {}
    for call in waiting:
        alike.setdefault(call.key, []).append(call)

    sizes = {key: 1 if key is None else _fitting(calls, room(calls[0])) for key, calls in alike.items()}

    def rank(call: Waiting) -> tuple[float, ...]:
        if now - call.since >= patience:
            return (0, call.since, call.id)
        return (
            1,
            given(call.caller),
            _left(call),
            0 if call.loop else -sizes[call.key],
            call.since,
            call.id,
        )

    if not waiting:
        return []
    ranked = sorted(waiting, key=rank)
    leader = ranked[0]
    group = _with_company(leader, ranked, room)
    if now - leader.since >= patience or leader.key is None:
        return group
    room_left = room(leader) - sum(call.rows for call in group)
    coming = [
        call
        for call in ranked
        if leader.key in call.loop
        and call.key != leader.key
        and call.rows <= room_left
        and _left(call) <= _left(leader)
    ]
    return max([group, *(_with_company(call, ranked, room) for call in coming)], key=_pull)


def loop(past: Sequence[Hashable]) -> Set[Hashable]:
    """What a request calls over and over: all since the last time but one that it was where it is now, `past`'s end.

    The last time is not enough: a step may call one ControlNet for both of two conditions.
    """
    now = past[-1]
    earlier = [at for at, key in enumerate(past[:-1]) if key == now]
    return frozenset(past[earlier[-2:][0] :]) if earlier else frozenset()


def _left(call: Waiting) -> float:
    return float("inf") if call.left is None else call.left


def _fitting(calls: Iterable[Waiting], room: int) -> int:
    sums = itertools.accumulate(sorted(call.rows for call in calls))
    return max(1, sum(rows <= room for rows in sums))


def _with_company(leader: Waiting, ranked: Iterable[Waiting], room: Callable[[Waiting], int]) -> list[Waiting]:
    group, rows = [leader], leader.rows
    if leader.key is None:
        return group
    limit = room(leader)
    for call in ranked:
        if call.key == leader.key and call is not leader and rows + call.rows <= limit:
            group.append(call)
            rows += call.rows
    return group


def _pull(group: Sequence[Waiting]) -> tuple[int, int]:
    """Of groups on their way to each other: the largest moves, of equal ones the one that moved last."""
    return len(group), max(call.since for call in group)
