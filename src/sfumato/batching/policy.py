"""Which parked calls run next: one pure function over what is known about them, without torch.

Every active request has at most one call parked. The next forward pass goes to

1. a call that has waited `patience` forward passes, the longest-waiting first;
2. the caller that has received least so far;
3. the request with the fewest steps left, if known: short ones overtake long ones;
4. modules called once (text encoders, decoders), and among those the call compatible with most others;
5. the call that has waited longest.

Calls with an equal key join its batch in the same order, as long as there is room. A short request, which would wait
for the rows of long ones at each of its few steps, takes along only as many of theirs as it can bear.

Requests that call several modules per step can be out of phase, one group at the ControlNet while another
is at the UNet, and alternating would keep them so forever. So a leader whose batch has room left lets another
group go first if that group will reach the leader's call (`Waiting.repeated_keys`) and is larger than its batch, or
equally large and moved last: that group keeps moving until it reaches the leader, and from then on they run
together. This usually costs the leader at most one step's forward passes, and never more than its patience.

No call starves: with A active requests it runs at the latest `patience + A` forward passes after it parked.
Once it has waited `patience` forward passes it lets no group go first, and only calls that parked earlier lead. There
are at most A - 1 of them, every forward pass removes the first of them, and none is added.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence, Set
from dataclasses import dataclass

PATIENCE = 16
"""Maximum forward passes of others that a call waits for, besides those of other calls that waited this long."""

LONGEST_LOOP = 64
"""Maximum calls per step to consider: ten ControlNets and a denoiser for each of five conditions are 55."""


SHORT = 4
"""A request is short beside those that still have this many times as many steps as all of its own."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A parked call as the policy sees it."""

    id: int
    """Number of its request, in order of arrival."""
    key: Hashable
    """Calls with equal keys may share a forward; None: this one runs alone."""
    rows: int
    since: int
    """Number of forward passes that had run when it parked."""
    caller: str = ""
    steps_left: int | None = None
    """Remaining denoising steps of its request."""
    repeated_keys: Set[Hashable] = frozenset()
    """Keys that its request is known to call in every step, so it will reach them again."""
    steps: int | None = None
    """All denoising steps of its request."""


def choose(
    waiting: Sequence[Waiting],
    now: int,
    room: Callable[[Waiting], int],
    rows_received: Callable[[str], float] = lambda caller: 0.0,
    patience: int = PATIENCE,
    bearable: Callable[[Waiting, int], int] = lambda leader, rows: rows,
) -> list[Waiting]:
    """The calls of the next forward pass; the first one is the leader.

    `now`: forward passes so far. `room`: maximum rows of a forward pass of this kind; a call with more runs alone.
    `rows_received`: rows computed for each caller so far. `bearable`: the rows, up to so many, of a forward pass that a
    short request leads and long ones join.
    """
    by_key: dict[Hashable, list[Waiting]] = {}
    for call in waiting:
        by_key.setdefault(call.key, []).append(call)

    sizes = {key: 1 if key is None else _fitting(calls, room(calls[0])) for key, calls in by_key.items()}

    def rank(call: Waiting) -> tuple[float, ...]:
        if now - call.since >= patience:
            return (0, call.since, call.id)
        return (
            1,
            rows_received(call.caller),
            _steps_left(call),
            0 if call.repeated_keys else -sizes[call.key],
            call.since,
            call.id,
        )

    if not waiting:
        return []
    ranked = sorted(waiting, key=rank)
    leader = ranked[0]
    group = _with_bearable(leader, _with_followers(leader, ranked, room), bearable)
    if now - leader.since >= patience or leader.key is None:
        return group
    room_left = room(leader) - sum(call.rows for call in group)
    coming = [
        call
        for call in ranked
        if leader.key in call.repeated_keys
        and call.key != leader.key
        and call.rows <= room_left
        and _steps_left(call) <= _steps_left(leader)
    ]
    return max([group, *(_with_followers(call, ranked, room) for call in coming)], key=_group_rank)


def repeated_keys(past: Sequence[Hashable]) -> Set[Hashable]:
    """The keys a request calls repeatedly: all since the second last occurrence of its current one, `past`'s end.

    The last occurrence is not enough: a step may call one ControlNet for each of two conditions.
    """
    now = past[-1]
    earlier = [at for at, key in enumerate(past[:-1]) if key == now]
    return frozenset(past[earlier[-2:][0] :]) if earlier else frozenset()


def _steps_left(call: Waiting) -> float:
    return float("inf") if call.steps_left is None else call.steps_left


def _fitting(calls: Iterable[Waiting], room: int) -> int:
    sums = itertools.accumulate(sorted(call.rows for call in calls))
    return max(1, sum(rows <= room for rows in sums))


def _with_followers(leader: Waiting, ranked: Iterable[Waiting], room: Callable[[Waiting], int]) -> list[Waiting]:
    group, rows = [leader], leader.rows
    if leader.key is None:
        return group
    limit = room(leader)
    for call in ranked:
        if call.key == leader.key and call is not leader and rows + call.rows <= limit:
            group.append(call)
            rows += call.rows
    return group


def _with_bearable(leader: Waiting, group: list[Waiting], bearable: Callable[[Waiting, int], int]) -> list[Waiting]:
    """`group` without the calls of long requests that a short leader cannot bear."""
    if leader.steps is None or all(_steps_left(call) < SHORT * leader.steps for call in group):
        return group
    limit = bearable(leader, sum(call.rows for call in group))
    kept, rows = [leader], leader.rows
    for call in group[1:]:
        if _steps_left(call) < SHORT * leader.steps or rows + call.rows <= limit:
            kept.append(call)
            rows += call.rows
    return kept


def _group_rank(group: Sequence[Waiting]) -> tuple[int, int]:
    """Sort key of groups that approach each other: the largest moves, of equal ones the one that moved last."""
    return len(group), max(call.since for call in group)
