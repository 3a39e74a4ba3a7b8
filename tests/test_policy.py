"""Which call runs next: order, fairness, and the bound on waiting."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.batching.policy import (
    LONGEST_LOOP,
    LOW_EVERY,
    PATIENCE,
    Waiting,
    bound,
    choose,
    low_bound,
    low_places,
    repeated_keys,
)  # fmt: skip


def call(id: int, **more: object) -> Waiting:
    return Waiting(**{"id": id, "key": "a", "rows": 2, "since": 0, **more})  # type: ignore[arg-type]


def ids(calls: list[Waiting]) -> list[int]:
    return [call.id for call in calls]


def test_alike_calls_run_together_up_to_the_room() -> None:
    assert ids(choose([call(n) for n in range(6)], 0, lambda _: 8)) == [0, 1, 2, 3]


def test_the_oldest_leads() -> None:
    assert ids(choose([call(0, since=5, key="b"), call(1, since=3)], 6, lambda _: 8)) == [1]


def test_the_caller_with_least_goes_first() -> None:
    parked = [call(0, caller="greedy"), call(1, since=1, key="b", caller="modest")]
    assert ids(choose(parked, 2, lambda _: 8, lambda call: {"greedy": 9.0, "modest": 1.0}[call.caller])) == [1]


def test_a_short_request_overtakes_long_ones() -> None:
    parked = [call(0, steps_left=50), call(1, steps_left=50), call(2, steps_left=4, since=3, key="b")]
    assert ids(choose(parked, 3, lambda _: 8)) == [2]


def test_the_call_that_most_are_like_goes_first() -> None:
    parked = [call(0, key="b"), call(1, since=1), call(2, since=1)]
    assert ids(choose(parked, 2, lambda _: 8)) == [1, 2]
    assert ids(choose(parked, 2, lambda _: 2)) == [0]  # so many do not fit: the older one
    assert ids(choose(parked, 2 + PATIENCE, lambda _: 8)) == [0]


def test_a_larger_group_on_its_way_goes_first() -> None:
    few = call(0, key="b", repeated_keys={"a", "b"}, caller="modest")
    many = [call(n, since=1, repeated_keys={"a", "b"}, caller="greedy") for n in (1, 2)]

    def had(call: Waiting) -> float:
        return {"greedy": 9.0, "modest": 1.0}[call.caller]

    assert ids(choose([few, *many], 2, lambda _: 8, had)) == [1, 2]
    assert ids(choose([few, *many], 2, lambda _: 2, had)) == [0]  # its forward is full: it has nobody to wait for
    assert ids(choose([few, *many], PATIENCE, lambda _: 8, had)) == [0]
    passing = [call(n, since=1, repeated_keys={"a"}, caller="greedy") for n in (1, 2)]
    assert ids(choose([few, *passing], 2, lambda _: 8, had)) == [0]  # they never come by


def test_nobody_with_more_steps_left_goes_first_on_his_way() -> None:
    few = call(0, key="b", repeated_keys={"a", "b"}, steps_left=4)
    many = [call(n, repeated_keys={"a", "b"}, steps_left=50) for n in (1, 2)]
    assert ids(choose([few, *many], 2, lambda _: 8)) == [0]


def test_of_equal_groups_the_one_that_moved_last_moves_on() -> None:
    one = [call(n, key="b", since=3, repeated_keys={"a", "b"}) for n in (0, 1)]
    other = [call(n, since=4, repeated_keys={"a", "b"}) for n in (2, 3)]
    assert ids(choose([*one, *other], 5, lambda _: 8)) == [2, 3]


def test_a_loop_is_what_came_since_the_last_time() -> None:
    assert repeated_keys("a") == set()
    assert repeated_keys("ttcu") == set()
    assert repeated_keys("ttcuc") == {"c", "u"}
    assert repeated_keys("ttcucdc") == {"c", "u", "d"}
    assert repeated_keys("ttcucud") == set()


def test_a_call_without_a_key_runs_alone() -> None:
    assert ids(choose([call(0, key=None), call(1, key=None)], 0, lambda _: 8)) == [0]


def test_a_call_larger_than_the_room_runs_alone() -> None:
    assert ids(choose([call(0, rows=9), call(1)], 0, lambda _: 8)) == [0]
    assert ids(choose([call(0, rows=1), call(1, rows=9), call(2, rows=3)], 0, lambda _: 4)) == [0, 2]


def test_nothing_waits_nothing_runs() -> None:
    assert choose([], 0, lambda _: 8) == []


# Priority and deadlines.


def test_low_calls_wait_for_interactive_ones_whatever_else_speaks_for_them() -> None:
    low = call(0, key="b", low=True, steps_left=1, deadline=1.0, since=10)
    late = call(1, steps_left=50, since=20)
    assert ids(choose([low, late], 10 + PATIENCE, lambda _: 8)) == [1]
    assert ids(choose([low], 0, lambda _: 8)) == [0]


def test_low_calls_fill_what_an_interactive_pass_leaves_and_bears() -> None:
    parked = [call(0, low=True), call(1, since=1), call(2, since=1, low=True), call(3, key="b", low=True), call(4)]
    assert ids(choose(parked, 2, lambda _: 8)) == [4, 1, 0, 2]
    assert ids(choose(parked, 2, lambda _: 4)) == [4, 1]
    assert ids(choose(parked, 2, lambda _: 6)) == [4, 1, 0]
    told: list[tuple[int, int, int]] = []

    def rides(leader: Waiting, rows: int, most: int) -> int:
        told.append((leader.id, rows, most))
        return rows

    assert ids(choose(parked, 2, lambda _: 8, rides=rides)) == [4, 1]
    assert told == [(4, 4, 8)]
    assert ids(choose([call(0, key=None), call(1, low=True)], 2, lambda _: 8)) == [0]


def test_riders_make_no_group_go_first() -> None:
    leader = call(0, key="b", repeated_keys={"a", "b"})
    coming = call(1, since=1, repeated_keys={"a", "b"})
    riders = [call(n, low=True, repeated_keys={"a", "b"}) for n in (2, 3)]
    assert ids(choose([leader, *riders], 2, lambda _: 8)) == [0]
    assert ids(choose([leader, coming, *riders], 2, lambda _: 8)) == [1, 2, 3], "it may, and takes them along"


def test_one_pass_in_so_many_is_led_by_the_low_call_that_waited_longest() -> None:
    parked = [call(0, key="b", low=True, since=3), call(1, key="b", low=True, since=1), call(2, since=30)]
    at = 1 + LOW_EVERY
    assert ids(choose(parked, at - 1, lambda _: 8)) == [2], "it has not waited for long enough"
    assert ids(choose(parked, at, lambda _: 8)) == [1, 0]
    assert ids(choose(parked, at, lambda _: 8, low_led=2)) == [2], "another one led not long ago"
    beside = call(3, key="b", since=29)
    assert ids(choose([*parked, beside], at, lambda _: 6)) == [1, 3, 0], "interactive ones first, in what room is left"


def test_the_earliest_deadline_of_a_caller_goes_first_and_overtakes_no_other_caller() -> None:
    parked = [call(0, key="a"), call(1, key="b", deadline=9.0, steps_left=50), call(2, key="c", deadline=5.0)]
    assert ids(choose(parked, 0, lambda _: 8)) == [2]
    pushing = [call(0, key="a", caller="modest"), call(1, key="b", deadline=1.0, caller="pushing")]
    received = {"modest": 1.0, "pushing": 2.0}
    assert ids(choose(pushing, 0, lambda _: 8, lambda call: received[call.caller])) == [0]
    assert ids(choose(parked, PATIENCE, lambda _: 8)) == [0], "and nobody for ever"


def test_places_of_low_priority_are_half_as_many() -> None:
    assert [low_places(places) for places in (1, 2, 3, 16)] == [1, 1, 2, 8]


arrivals = st.lists(
    st.builds(
        call,
        st.just(0),
        key=st.sampled_from(["a", "b", "c", None]),
        rows=st.integers(1, 5),
        caller=st.sampled_from(["x", "y"]),
        steps_left=st.none() | st.integers(0, 50),
        repeated_keys=st.frozensets(st.sampled_from("abc")),
        low=st.booleans(),
        deadline=st.none() | st.floats(0, 100),
    ),
    min_size=1,
    max_size=12,
)


@given(arrivals, st.integers(1, 6), st.integers(1, 25), st.sampled_from([0, 1, 9]), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_no_call_waits_longer_than_the_bound(
    active: list[Waiting], room: int, patience: int, riding: int, random
) -> None:
    """Requests park again and again, each time as whatever hurts most and with ever earlier deadlines; none waits over
    its bound, of low priority or not."""
    parked = {n: c._replace(id=n) for n, c in enumerate(active)}
    low = sum(c.low for c in active)
    bounds = {False: bound(len(active) - low, patience), True: low_bound(low, patience)}
    given_: Counter[tuple[str, bool]] = Counter()
    low_led = 0
    for now in range(400):
        group = choose(
            list(parked.values()), now, lambda _: room, lambda call: given_[call.caller, call.low], patience,
            rides=lambda leader, rows, most: min(most, rows + riding), low_led=low_led,
        )  # fmt: skip
        assert group
        assert len(group) == 1 or sum(c.rows for c in group) <= room
        assert len({c.key for c in group}) == 1
        assert len({c.id for c in group}) == len(group)
        low_led = now if group[0].low else low_led
        for c in parked.values():
            assert now - c.since <= bounds[c.low]
        for c in group:
            given_[c.caller, c.low] += c.rows
            earlier = None if c.deadline is None else -float(now)
            shape = random.choice(active)
            parked[c.id] = shape._replace(id=c.id, since=now + 1, low=c.low, deadline=earlier)


def test_interactive_requests_lose_no_more_to_others_than_their_share() -> None:
    """One of many steps beside low ones of other modules, for ever: 19 of 20 forward passes are its own."""
    parked = {0: call(0, key="a"), **{n: call(n, key=f"k{n}", low=True) for n in range(1, 9)}}
    led: Counter[bool] = Counter()
    low_led = 0
    for now in range(2000):
        (leader,) = choose(list(parked.values()), now, lambda _: 8, low_led=low_led)
        low_led = now if leader.low else low_led
        led[leader.low] += 1
        parked[leader.id] = leader._replace(since=now + 1)
    assert 2000 / LOW_EVERY - 2 <= led[True] <= 2000 / LOW_EVERY
    assert all(c.since > 2000 - low_bound(8) for c in parked.values())


def test_the_default_patience_is_a_few_steps() -> None:
    assert 4 <= PATIENCE <= 64


# What comes of it: requests that call the same few modules again and again, and come when they like.


@dataclass
class Request:
    """Its calls in order, one letter each; those of a step come again in each."""

    id: int
    comes: int
    calls: str
    step: int
    """Calls in a step."""
    caller: str = ""
    tells: bool = False
    """Whether it says how many steps are left."""
    at: int = 0
    since: int = 0
    waits: list[int] = field(default_factory=list)
    ended: int = 0

    def waiting(self) -> Waiting:
        past = self.calls[: self.at + 1][-LONGEST_LOOP:]
        left = (len(self.calls) - self.at) // self.step if self.tells else None
        return Waiting(self.id, self.calls[self.at], 2, self.since, self.caller, left, repeated_keys(past))


def drawn(requests: Sequence[Request], room: int = 8) -> float:
    """Run all to their ends; calls per forward."""
    now = 0
    had: Counter[str] = Counter()
    while any(not request.ended for request in requests):
        active = [request for request in requests if request.comes <= now and not request.ended]
        for request in active:
            request.since = max(request.since, request.comes)
        group = choose([request.waiting() for request in active], now, lambda _: room, lambda call: had[call.caller])
        now += 1
        for request in (requests[call.id] for call in group):
            request.waits.append(now - 1 - request.since)
            request.at, request.since = request.at + 1, now
            request.ended = now if request.at == len(request.calls) else 0
            had[request.caller] += 2
    return sum(len(request.calls) for request in requests) / now


def at_random(step: str, seed: int, *, tells: bool = False, callers: int = 1) -> list[Request]:
    """Four requests of 30 steps that come within 30 forwards."""
    dice = random.Random(seed)
    comes = sorted(dice.randrange(30) for _ in range(4))
    return [Request(n, at - comes[0], step * 30, len(step), str(n % callers), tells) for n, at in enumerate(comes)]


STEPS = {
    "ab": (2.9, 2.5), "abc": (3.1, 2.8), "abcd": (3.2, 2.9), "abcdef": (3.3, 3.2),
    "aab": (2.9, 2.3), "aaab": (3.0, 2.3), "acbc": (3.0, 2.1),
}  # fmt: skip
"""What a step calls → calls per forward, on average and at worst: the denoiser for each branch of guidance (LTX-2),
a ControlNet for each or for both. With the longest waiting first: 2.3, 2.0 and 1.6 for 3, 4 and 6, 1.0 at worst."""


@pytest.mark.parametrize("callers", [1, 2, 4])
@pytest.mark.parametrize("tells", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_requests_out_of_phase_find_each_other(step: str, tells: bool, callers: int) -> None:
    found = [drawn(at_random(step, seed, tells=tells, callers=callers)) for seed in range(100)]
    assert mean(found) >= STEPS[step][0]
    assert min(found) >= STEPS[step][1]


def test_two_groups_that_take_turns_become_one() -> None:
    for apart in range(1, 6):
        pairs = [Request(n, apart * (n // 2), "abcdef" * 30, 6) for n in range(4)]
        assert drawn(pairs) >= 3.7


def test_pictures_of_another_kind_are_not_waited_for() -> None:
    """One caller's five alike do not hold up somebody's single one that has nothing in common with them."""
    greedy = [Request(n, 0, "ab" * 50, 2, "greedy") for n in range(5)]
    modest = Request(5, 40, "tt" + "cd" * 20 + "v", 2, "modest")
    drawn([*greedy, modest])
    assert max(modest.waits) <= 2
    assert modest.ended - modest.comes <= 2 * len(modest.calls)


@pytest.mark.parametrize("step", ["a", "ab", "abcd"])
@pytest.mark.parametrize("tells", [False, True])
def test_a_short_request_overtakes_whoever_is_long(step: str, tells: bool) -> None:
    """Four steps behind six times fifty, and a forward that holds four: nearly as fast as alone."""
    longs = [Request(n, 0, "t" + step * 50 + "v", len(step), tells=tells) for n in range(6)]
    short = Request(6, 30, "t" + step * 4 + "v", len(step), tells=tells)
    drawn([*longs, short])
    assert short.ended - short.comes <= (1.1 if tells else 2.5) * len(short.calls)


def test_callers_share_though_one_has_many() -> None:
    many = [Request(n, 0, "abc" * 40, 3, "greedy") for n in range(12)]
    one = Request(12, 50, "abc" * 40, 3, "modest")
    drawn([*many, one])
    assert one.ended - one.comes <= len(one.calls) + 3
