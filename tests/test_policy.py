"""Which call runs next: order, fairness, and the bound on waiting."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.engine.policy import PATIENCE, Waiting, choose


def call(id: int, **more: object) -> Waiting:
    return Waiting(**{"id": id, "key": "a", "rows": 2, "since": 0, **more})  # type: ignore[arg-type]


def ids(calls: list[Waiting]) -> list[int]:
    return [call.id for call in calls]


def test_alike_calls_run_together_up_to_the_room() -> None:
    assert ids(choose([call(n) for n in range(6)], 0, lambda _: 8)) == [0, 1, 2, 3]


def test_the_oldest_leads() -> None:
    assert ids(choose([call(0, since=5, key="b"), call(1, since=3)], 6, lambda _: 8)) == [1]


def test_priority_goes_first_and_others_may_join() -> None:
    parked = [call(0, since=1), call(1, since=2, key="b"), call(2, since=3, priority=1)]
    assert ids(choose(parked, 4, lambda _: 8)) == [2, 0]


def test_the_caller_with_least_goes_first() -> None:
    parked = [call(0, caller="greedy"), call(1, since=1, key="b", caller="modest")]
    assert ids(choose(parked, 2, lambda _: 8, {"greedy": 9.0, "modest": 1.0}.__getitem__)) == [1]


def test_a_short_request_overtakes_long_ones() -> None:
    parked = [call(0, left=50), call(1, left=50), call(2, left=4, since=3, key="b")]
    assert ids(choose(parked, 3, lambda _: 8)) == [2]


def test_a_call_without_a_key_runs_alone() -> None:
    assert ids(choose([call(0, key=None), call(1, key=None)], 0, lambda _: 8)) == [0]


def test_a_call_larger_than_the_room_runs_alone() -> None:
    assert ids(choose([call(0, rows=9), call(1)], 0, lambda _: 8)) == [0]
    assert ids(choose([call(0, rows=1), call(1, rows=9), call(2, rows=3)], 0, lambda _: 4)) == [0, 2]


def test_nothing_waits_nothing_runs() -> None:
    assert choose([], 0, lambda _: 8) == []


arrivals = st.lists(
    st.builds(
        call,
        st.just(0),
        key=st.sampled_from(["a", "b", "c", None]),
        rows=st.integers(1, 5),
        priority=st.integers(0, 3),
        caller=st.sampled_from(["x", "y"]),
        left=st.none() | st.integers(0, 50),
    ),
    min_size=1,
    max_size=12,
)


@given(arrivals, st.integers(1, 6), st.integers(1, 20), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_no_call_waits_longer_than_the_bound(active: list[Waiting], room: int, patience: int, random) -> None:
    """Requests park again and again, each time as whatever hurts most; none waits over `patience + active`."""
    parked = {n: Waiting(n, c.key, c.rows, 0, c.priority, c.caller, c.left) for n, c in enumerate(active)}
    given_: dict[str, float] = {"x": 0.0, "y": 0.0}
    for now in range(120):
        group = choose(list(parked.values()), now, lambda _: room, given_.__getitem__, patience)
        assert group
        assert len(group) == 1 or sum(c.rows for c in group) <= room
        assert len({c.key for c in group}) == 1
        for c in group:
            assert now - c.since < patience + len(parked)
            given_[c.caller] += c.rows
            shape = random.choice(active)
            parked[c.id] = Waiting(c.id, shape.key, shape.rows, now + 1, shape.priority, shape.caller, shape.left)


def test_the_default_patience_is_a_few_steps() -> None:
    assert 4 <= PATIENCE <= 64
