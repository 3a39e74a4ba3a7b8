"""Whose turn it is: bounded, fair between callers, positions that come true."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.batching.fair_share import FairShare
from sfumato.batching.policy import Waiting, choose
from sfumato.errors import InvalidRequest, TooManyRequests
from sfumato.serving.queue import MAX_RETRY_AFTER_S, Queue, Ticket


def within_a_loop(body: Callable[[], None]) -> None:
    async def run() -> None:
        body()

    asyncio.run(run())


def called(tickets: list[Ticket]) -> list[bool]:
    return [ticket.called.is_set() for ticket in tickets]


def test_places_are_given_in_order() -> None:
    def body() -> None:
        queue = Queue(places=2, limit=10)
        first, second, third = [queue.join(caller, 1)[0] for caller in "abc"]
        assert called([first, second, third]) == [True, True, False]
        assert (queue.running, queue.waiting) == (2, 1)
        queue.leave(first, drawn=True)
        assert third.called.is_set()

    within_a_loop(body)


def test_one_callers_burst_does_not_make_another_wait() -> None:
    def body() -> None:
        queue = Queue(places=4, limit=100)
        burst = queue.join("a", 50)
        assert sum(called(burst)) == 3
        (other,) = queue.join("b", 1)
        assert other.called.is_set()

    within_a_loop(body)


def test_callers_who_wait_take_turns() -> None:
    def body() -> None:
        queue = Queue(places=1, limit=100)
        tickets = {caller: queue.join(caller, 3) for caller in "abc"}
        order = []
        while queue.running:
            caller, ticket = next((c, t) for c, ts in tickets.items() for t in ts if t.called.is_set())
            order.append(caller)
            tickets[caller].remove(ticket)
            queue.leave(ticket, drawn=True)
        assert order == list("abcabcabc")

    within_a_loop(body)


def test_a_full_line_refuses_and_says_when_to_come_again() -> None:
    def body() -> None:
        queue = Queue(places=1, limit=2)
        queue.join("a", 3)
        for caller, count in (("a", 1), ("b", 2)):
            with pytest.raises(TooManyRequests, match="max_queue") as caught:
                queue.join(caller, count)
            assert 1 <= caught.value.retry_after <= MAX_RETRY_AFTER_S
        assert queue.waiting == 2
        queue.join("b", 1)  # has nothing in the line that another has filled
        with pytest.raises(TooManyRequests):
            queue.join("b", 1)
        queue.join("c", 1)
        with pytest.raises(TooManyRequests):  # twice as long is the end of it
            queue.join("d", 1)

    within_a_loop(body)


def test_who_leaves_before_the_turn_comes_frees_its_place_in_the_line() -> None:
    def body() -> None:
        queue = Queue(places=1, limit=1)
        first, second = queue.join("a", 2)
        queue.leave(second, drawn=False)
        queue.leave(second, drawn=False)
        assert queue.waiting == 0
        (third,) = queue.join("b", 1)
        queue.leave(first, drawn=True)
        assert third.called.is_set()
        assert queue.mean_s() is not None

    within_a_loop(body)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4)), min_size=1, max_size=8), st.integers(1, 4))
def test_positions_come_true_and_everybody_is_served(joins: list[tuple[str, int]], places: int) -> None:
    def body() -> None:
        queue = Queue(places, limit=100)
        tickets = [ticket for caller, count in joins for ticket in queue.join(caller, count)]
        waiting = [ticket for ticket in tickets if not ticket.called.is_set()]
        positions = [queue.position(ticket) for ticket in waiting]
        assert sorted(positions) == list(range(1, len(waiting) + 1))
        while queue.running:
            drawing = [ticket for ticket in tickets if ticket.called.is_set()]
            for ticket in drawing:
                queue.leave(ticket, drawn=True)
                tickets.remove(ticket)
        assert (tickets, queue.waiting) == ([], 0)

    within_a_loop(body)


def by_turns(queue: Queue) -> dict[Ticket, int]:
    """The positions by the rule itself, one turn after another: cubic, and nothing to serve with."""
    waiting = [ticket for line in queue._lines.values() for ticket in line]
    held, served, positions = Counter(queue._in_flight), dict(queue._served), {}
    while waiting:
        following = min(
            waiting, key=lambda each: (each.line.low, held[each.line], served.get(each.line, 0), *each.order)
        )
        waiting.remove(following)
        positions[following] = len(positions) + 1
        held[following.line] += 1
        served[following.line] = queue._turns + len(positions)
    return positions


class Counted(Queue):
    foreseen = 0

    def _simulated_positions(self) -> dict[Ticket, int]:
        self.foreseen += 1
        return super()._simulated_positions()


EVENTS = st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 5), st.integers(0, 99)), max_size=30)


@given(EVENTS, st.integers(1, 5))
def test_positions_are_those_of_the_rule_and_worked_out_once_for_each_change(
    events: list[tuple[str, int, int]], places: int
) -> None:
    def body() -> None:
        queue = Counted(places, limit=1000)
        tickets: list[Ticket] = []
        for caller, count, chosen in events:
            if count:
                tickets += queue.join(caller, count)
            elif tickets:
                queue.leave(tickets.pop(chosen % len(tickets)), drawn=chosen % 2 == 0)
            before = queue.foreseen
            asked = {ticket: position for ticket in tickets if (position := queue.position(ticket))}
            assert asked == by_turns(queue)
            assert queue.foreseen - before <= 1
        assert queue.waiting + queue.running == len(tickets)
        for ticket in tickets:
            queue.leave(ticket, drawn=False)
            queue.leave(ticket, drawn=False)
        assert (queue.waiting, queue.running, queue._lines, queue._in_flight, queue._served) == (0, 0, {}, {}, {})

    within_a_loop(body)


@pytest.mark.parametrize("callers", [1, 10_000])
def test_ten_thousand_may_wait_ask_and_leave(callers: int) -> None:
    def body() -> None:
        queue = Queue(places=16, limit=10_000)
        began = time.process_time()
        tickets = [queue.join(f"caller {i % callers}", 1)[0] for i in range(10_000)]
        assert len({queue.position(ticket) for ticket in tickets}) == queue.waiting + 1  # 0 is of those who draw
        for ticket in reversed(tickets):
            queue.leave(ticket, drawn=False)
        assert (queue.waiting, queue.running) == (0, 0)
        assert time.process_time() - began < 10  # in a quadratic way each of the three takes minutes

    within_a_loop(body)


def test_what_is_not_ready_is_passed_over_and_keeps_its_place() -> None:
    async def run() -> None:
        queue = Queue(1, 3)
        slow = queue.join("ann", 2, ready=False)
        (drawn,) = queue.join("bob", 1)
        (later,) = queue.join("ann", 1)
        assert drawn.called.is_set()
        assert (queue.running, queue.waiting) == (1, 3)
        assert [queue.position(ticket) for ticket in (*slow, later)] == [0, 0, 1]
        with pytest.raises(TooManyRequests):
            queue.join("ann", 1)  # they count
        queue.release(slow)
        queue.release(slow)
        assert queue.waiting == 3
        assert [queue.position(ticket) for ticket in (*slow, later)] == [1, 2, 3]
        queue.leave(drawn, drawn=True)
        assert slow[0].called.is_set()
        for ticket in (*slow, later):
            queue.leave(ticket, drawn=False)
            queue.release([ticket])  # too late
        assert (queue.running, queue.waiting) == (0, 0)

    asyncio.run(run())


def test_what_is_not_ready_can_leave() -> None:
    async def run() -> None:
        queue = Queue(1, 3)
        for ticket in queue.join("ann", 2, ready=False):
            queue.leave(ticket, drawn=False)
            queue.leave(ticket, drawn=False)
        assert (queue.running, queue.waiting) == (0, 0)
        assert queue.join("ann", 1)[0].called.is_set()

    asyncio.run(run())


STEPS = 20


@pytest.mark.parametrize("fair_places", [True, False])
@pytest.mark.parametrize("fair_forwards", [True, False])
def test_places_and_forwards_are_both_shared_or_one_picture_waits_for_a_hundred(
    fair_places: bool, fair_forwards: bool
) -> None:
    """The line without the engine's share, and the other way round: neither is enough."""

    def body() -> None:
        queue, share = Queue(places=16, limit=200), FairShare()
        many = queue.join("greedy", 100)
        parked: dict[Ticket, Waiting] = {}
        forwards = 0

        def turn() -> None:
            for ticket in [*many, *one]:
                if ticket.since is not None and ticket not in parked:
                    caller = "modest" if ticket in one else "greedy"
                    share.enter(caller, [call.caller for call in parked.values()])
                    parked[ticket] = Waiting(ticket.number, "unet", 2, forwards, caller, STEPS)

            def given(call: Waiting) -> float:
                return share.of(call.caller) if fair_forwards else 0.0

            chosen = {call.id for call in choose(list(parked.values()), forwards, lambda _: 8, given)}
            for ticket in [ticket for ticket in parked if ticket.number in chosen]:
                call = parked.pop(ticket)
                share.add(call.caller, call.rows)
                assert call.steps_left is not None
                if call.steps_left > 1:
                    parked[ticket] = call._replace(since=forwards + 1, steps_left=call.steps_left - 1)
                else:
                    queue.leave(ticket, drawn=True)

        one: list[Ticket] = []
        while forwards < 2 * STEPS:
            turn()
            forwards += 1
        one = queue.join("modest" if fair_places else "greedy", 1)
        while one[0].since is not None or queue.position(one[0]):
            turn()
            forwards += 1
        took = forwards - 2 * STEPS
        assert (took <= STEPS + 3) is (fair_places and fair_forwards), took

    within_a_loop(body)


def test_a_picture_whose_model_is_loaded_takes_no_place() -> None:
    def body() -> None:
        queue = Queue(places=1, limit=2)
        slow, other, last = (queue.join(caller, 1)[0] for caller in "abc")
        queue.place(other, False)  # its turn has not come: there is nothing to give up
        queue.place(slow, False)
        assert called([slow, other, last]) == [True, True, False]
        assert (queue.running, queue.waiting) == (1, 2)
        with pytest.raises(TooManyRequests):
            queue.join("c", 1)  # what waits for a load counts as waiting
        queue.place(slow, True)
        assert (queue.running, queue.waiting) == (2, 1)
        queue.leave(other, drawn=True)
        assert not last.called.is_set(), "the one that came back has the place"
        queue.place(slow, False)
        queue.place(slow, False)
        assert last.called.is_set()
        queue.leave(slow, drawn=False)
        queue.place(slow, True)
        queue.leave(last, drawn=True)
        assert (queue.running, queue.waiting) == (0, 0)

    within_a_loop(body)


def test_a_burst_for_a_model_that_is_loaded_keeps_its_share_and_no_more() -> None:
    """Otherwise all of it would be in flight when the load has ended, and another's single picture after it."""

    def body() -> None:
        queue = Queue(places=4, limit=100)
        burst = queue.join("ann", 60, model="slow")
        aside: list[Ticket] = []
        while turns := [each for each in burst if each.called.is_set() and each not in aside]:
            for ticket in turns:
                queue.place(ticket, False)
                aside.append(ticket)
        assert len(aside) == 3
        assert (queue.running, queue.waiting) == (0, 60)
        waiting = [each for each in burst if each not in aside]
        assert not any(queue.position(each) for each in waiting), "nobody knows when"
        same_caller = queue.join("ann", 1, model="other")[0]
        assert same_caller.called.is_set(), "of another model, which is in memory"
        queue.leave(same_caller, drawn=True)
        queue.leave(waiting.pop(), drawn=False)  # cancelled meanwhile
        for ticket in aside:
            queue.place(ticket, True)
        assert queue.running == 3
        single = queue.join("bob", 1)[0]
        assert single.called.is_set()
        queue.leave(aside[0], drawn=True)
        queue.leave(single, drawn=True)
        assert [each.called.is_set() for each in waiting] == [True] + [False] * 55, "in order, as the load has ended"
        for ticket in (single, *burst):
            queue.leave(ticket, drawn=True)
        assert (queue.running, queue.waiting) == (0, 0)

    within_a_loop(body)


def test_more_than_ever_has_room_is_no_reason_to_try_again() -> None:
    queue = Queue(2, 3)
    assert len(queue.join("a", 4)) == 4
    with pytest.raises(InvalidRequest, match="n: 5 pictures in one request never have room; at most 4 do"):
        Queue(2, 3).join("a", 5)
