"""Which parked calls run next: one pure function over what is known about them, without torch.

Every active request has at most one call parked. The next forward pass goes to

1. an interactive call that has waited `patience` forward passes, the longest-waiting first;
2. the caller that has received least so far;
3. the request with the earliest deadline, if it has one;
4. the request with the fewest steps left, if known: short ones overtake long ones;
5. modules called once (text encoders, decoders), and among those the call compatible with most others;
6. the call that has waited longest.

Calls with an equal key join its batch in the same order, as long as there is room. A short request, which would wait
for the rows of long ones at each of its few steps, takes along only as many of theirs as it can bear.

Requests that call several modules per step can be out of phase, one group at the ControlNet while another
is at the UNet, and alternating would keep them so forever. So a leader whose batch has room left lets another
group go first if that group will reach the leader's call (`Waiting.repeated_keys`) and is larger than its batch, or
equally large and moved last: that group keeps moving until it reaches the leader, and from then on they run
together. This usually costs the leader at most one step's forward passes, and never more than its patience.

Calls of low priority run when no interactive call waits, in the same order among themselves. They also ride along in an
interactive forward pass, in what room it leaves, as far as it bears them; and one in `LOW_EVERY` forward passes is led
by the low call that has waited longest.

No call starves. With A interactive requests active, one of their calls runs at the latest `bound` forward passes after
it parked. Once it has waited `patience` forward passes it lets no group go first, and only calls that parked earlier
lead, besides the low ones' share. There are at most A - 1 of them, every forward pass removes the first of them, and
none is added. With B low ones, each runs at the latest `low_bound` forward passes after it parked: from `LOW_EVERY` on
only low calls that parked earlier lead those of the share, and there are at most B - 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence, Set
from typing import NamedTuple

PATIENCE = 16
"""Maximum forward passes of others that a call waits for, besides those of other calls that waited this long."""

LONGEST_LOOP = 64
"""Maximum calls per step to consider: ten ControlNets and a denoiser for each of five conditions are 55."""

LOW_EVERY = 20
"""One forward pass in so many is led by a call of low priority that has waited as many: 5 % of them."""

SHORT = 4
"""A request is short beside those that still have this many times as many steps as all of its own."""


class Waiting(NamedTuple):
    """A parked call as the policy sees it. A tuple, as there is a new one for each forward pass."""

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
    low: bool = False
    """Whether its request yields to interactive ones."""
    deadline: float | None = None
    """When its request should be done; only the order among its caller's requests counts."""


def low_places(places: int) -> int:
    """Maximum requests of low priority that draw beside so many interactive ones, which never wait for their places."""
    return (places + 1) // 2


def bound(active: int, patience: int = PATIENCE) -> int:
    """Maximum forward passes that an interactive call waits for, with so many interactive requests active."""
    own = patience + active
    return own + own // (LOW_EVERY - 1) + 1


def low_bound(low: int, patience: int = PATIENCE) -> int:
    """The same for a call of low priority, with so many requests of low priority active."""
    return max(LOW_EVERY, patience) + LOW_EVERY * low


def choose(
    waiting: Sequence[Waiting],
    now: int,
    room: Callable[[Waiting], int],
    rows_received: Callable[[Waiting], float] = lambda call: 0.0,
    patience: int = PATIENCE,
    bearable: Callable[[Waiting, int], int] = lambda leader, rows: rows,
    rides: Callable[[Waiting, int, int], int] = lambda leader, rows, most: most,
    low_led: int = 0,
) -> list[Waiting]:
    """The calls of the next forward pass; the first one is the leader.

    `now`: forward passes so far. `room`: maximum rows of a forward pass of this kind; a call with more runs alone.
    `rows_received`: rows computed so far for the caller of a call, in its class. `bearable`: the rows, up to so many,
    of a forward pass that a short request leads and long ones join. `rides`: the rows, up to so many, of an interactive
    forward pass of so many that low ones fill. `low_led`: `now` when a low call led last.
    """
    if len(waiting) == 1:  # the usual case, at no cost
        return [*waiting]
    interactive = [call for call in waiting if not call.low]
    low = [call for call in waiting if call.low]
    ranked = _ranked(interactive or low, now, room, rows_received, patience)
    if not low or not interactive:
        return _group(ranked, now, room, patience, bearable)
    if owed := _owed(low, now, low_led, patience):
        return _with_followers(owed, [*ranked, *sorted(low, key=_since)], room)
    group = _group(ranked, now, room, patience, bearable)
    riders = [call for call in low if call.key == group[0].key is not None]
    return _with_riders(group, _ranked(riders, now, room, rows_received, patience), room, rides)


def _ranked(
    calls: Sequence[Waiting],
    now: int,
    room: Callable[[Waiting], int],
    rows_received: Callable[[Waiting], float],
    patience: int,
) -> list[Waiting]:
    """These calls, which are of one class, the next one first."""
    if len(calls) < 2:
        return [*calls]

    def size(key: Hashable) -> int:
        alike = [call for call in calls if call.key == key]
        return 1 if key is None else _fitting(alike, room(alike[0]))

    sizes = {key: size(key) for key in {call.key for call in calls if not call.repeated_keys}}

    def rank(call: Waiting) -> tuple[float, ...]:
        if now - call.since >= patience:
            return (0, *_since(call))
        return (
            1,
            rows_received(call),
            _INFINITE if call.deadline is None else call.deadline,
            _steps_left(call),
            0 if call.repeated_keys else -sizes[call.key],
            *_since(call),
        )

    return sorted(calls, key=rank)


def _group(
    ranked: Sequence[Waiting],
    now: int,
    room: Callable[[Waiting], int],
    patience: int,
    bearable: Callable[[Waiting, int], int],
) -> list[Waiting]:
    """The calls of the next forward pass among those of one class."""
    if not ranked:
        return []
    leader = ranked[0]
    group = _with_bearable(leader, _with_followers(leader, ranked, room), bearable)
    if now - leader.since >= patience or leader.key is None:
        return group
    coming = [call for call in ranked if call.key != leader.key and leader.key in call.repeated_keys]
    if not coming:
        return group
    room_left = room(leader) - sum(call.rows for call in group)
    coming = [call for call in coming if call.rows <= room_left and _steps_left(call) <= _steps_left(leader)]
    return max([group, *(_with_followers(call, ranked, room) for call in coming)], key=_group_rank)


def _owed(low: Sequence[Waiting], now: int, low_led: int, patience: int) -> Waiting | None:
    """The low call that leads although interactive ones wait; None: none has waited for long enough."""
    first = min(low, key=_since)
    waited = now - first.since >= max(LOW_EVERY, patience)
    return first if waited and now - low_led >= LOW_EVERY else None


def _with_riders(
    group: list[Waiting],
    low: Sequence[Waiting],
    room: Callable[[Waiting], int],
    rides: Callable[[Waiting, int, int], int],
) -> list[Waiting]:
    """An interactive group with the low calls of its key beside it that it bears."""
    if not low:
        return group
    leader, rows = group[0], sum(call.rows for call in group)
    whole = _filled(group, rows, low, room(leader))
    if len(whole) == len(group):
        return group
    return _filled(group, rows, low, rides(leader, rows, sum(call.rows for call in whole)))


def repeated_keys(past: Sequence[Hashable]) -> Set[Hashable]:
    """The keys a request calls repeatedly: all since the second last occurrence of its current one, `past`'s end.

    The last occurrence is not enough: a step may call one ControlNet for each of two conditions.
    """
    now = past[-1]
    earlier = [at for at, key in enumerate(past[:-1]) if key == now]
    return frozenset(past[earlier[-2:][0] :]) if earlier else frozenset()


_INFINITE = float("inf")


def _since(call: Waiting) -> tuple[int, int]:
    return call.since, call.id


def _steps_left(call: Waiting) -> float:
    return _INFINITE if call.steps_left is None else call.steps_left


def _fitting(calls: Iterable[Waiting], room: int) -> int:
    sums = itertools.accumulate(sorted(call.rows for call in calls))
    return max(1, sum(rows <= room for rows in sums))


def _with_followers(leader: Waiting, ranked: Iterable[Waiting], room: Callable[[Waiting], int]) -> list[Waiting]:
    return [leader] if leader.key is None else _filled([leader], leader.rows, ranked, room(leader))


def _filled(group: Sequence[Waiting], rows: int, ranked: Iterable[Waiting], limit: int) -> list[Waiting]:
    """`group` of so many rows, and those of `ranked` that fit in beside it."""
    leader, filled = group[0], [*group]
    for call in ranked:
        if call.key == leader.key and call is not leader and rows + call.rows <= limit:
            filled.append(call)
            rows += call.rows
    return filled


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
