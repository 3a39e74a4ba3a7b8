"""The simulation: what it foresees where that can be told by hand, and that everything is answered once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import simulate, simulate_check, simulated
from benchmarks.arrivals import BURST, BURST_S, PERIOD_S, Mix, Wanted, trace
from benchmarks.simulated import Served, Simple, Totals
from benchmarks.step_times import StepTimes
from sfumato.batching import policy
from sfumato.process import routing
from sfumato.serving import queue

TIMES = StepTimes(
    passes={"encode": {1: 0.25}, "denoise 64": {2: 1.0, 8: 2.5}, "denoise 128": {2: 4.0, 8: 10.0},
            "decode 64": {1: 0.5}, "decode 128": {1: 2.0}},
    between=dict.fromkeys(("encode", "denoise 64", "denoise 128", "decode 64", "decode 128"), 0.125),
    turn=0.0625,
    begin=0.5, end=0.25, load=20.0,
)  # fmt: skip
MIX = Mix(sides=[(64, 1), (128, 1)], steps=[(2, 1), (5, 1)], models=3, callers=3)


def wanted(at: float = 0.0, steps: int = 4, *, low: bool = False, side: int = 64, model: str = "model 0") -> Wanted:
    return Wanted(at, "someone", model, side, steps, low)


def took(way: Served | Simple, arrivals: list[Wanted]) -> Totals:
    return way.run(arrivals, ["model 0"])


def test_it_decides_with_the_code_that_serves() -> None:
    assert simulated.choose is policy.choose
    assert simulated.Router is routing.Router
    assert simulated.Queue is queue.Queue


def test_times_lie_on_lines_through_what_was_measured() -> None:
    times = replace(TIMES, passes=TIMES.passes | {"d": {2: 1.0, 4: 2.0, 8: 3.0}})
    assert [times.of("d", rows) for rows in (1, 2, 3, 4, 6, 8, 12)] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
    assert times.of("encode", 3) == 0.75, "one number is all there is: by rows"


def test_one_picture_takes_what_it_takes_alone() -> None:
    alone = 0.5 + (0.25 + 4 * 1.0 + 0.5) + 5 * (0.125 + 0.0625) + 0.25
    assert TIMES.alone(64, 4) == alone
    for way in (Served(TIMES, 2, slack=4), Simple(TIMES, 2, slack=4, most=1), Simple(TIMES, 2, slack=4, most=4)):
        totals = took(way, [wanted()])
        assert totals.latencies == {False: [pytest.approx(alone)], True: []}
        assert totals.met == 1


def test_first_come_first_served_is_one_after_another() -> None:
    alone = TIMES.alone(64, 4)
    totals = took(Simple(TIMES, 1, slack=1.5, most=1), [wanted(), wanted(), wanted(0.1, steps=1)])
    short = 2 * (alone - 0.25) + TIMES.alone(64, 1) - 0.1
    assert totals.latencies[False] == pytest.approx([alone, 2 * alone - 0.25, short])
    assert totals.met == 1


def test_a_static_batch_takes_those_that_are_alike_and_wait() -> None:
    totals = took(Simple(TIMES, 1, slack=4, most=4), [wanted(steps=9), *[wanted(1.0)] * 5, wanted(1.0, side=128)])
    assert totals.passes == 9 + 4 + 4 + 4
    assert totals.calls == 9 + 4 * 4 + 4 + 4


def test_the_server_draws_together_and_the_short_one_first() -> None:
    """Six passes of the denoiser: five of the long one, the short one in the first two of them."""
    totals = took(Served(TIMES, 1, slack=4), [wanted(steps=6), wanted(steps=2)])
    assert (totals.passes, totals.calls) == (6, 8)
    short, long = sorted(totals.latencies[False])
    assert short < TIMES.alone(64, 2) + 4
    assert long < TIMES.alone(64, 6) + 4


def test_an_interactive_picture_waits_for_one_pass_of_a_batch_at_most() -> None:
    batch = [wanted(steps=50, low=True, side=128) for _ in range(4)]
    totals = took(Served(TIMES, 1, slack=4), [*batch, wanted(100.0)])
    longest = TIMES.of("denoise 128", 8) + 4 * 0.125
    assert totals.latencies[False][0] <= TIMES.alone(64, 4) + longest
    assert len(totals.latencies[True]) == 4
    waiting = took(Simple(TIMES, 1, slack=4, most=4), [*batch, wanted(100.0)])
    assert waiting.latencies[False][0] > 300


def test_a_model_is_loaded_where_it_is_not_there_and_others_draw_meanwhile() -> None:
    totals = took(Served(TIMES, 1, slack=4), [wanted(model="model 1"), wanted()])
    first, second = totals.latencies[False]
    assert first == pytest.approx(TIMES.alone(64, 4)), "in memory"
    assert second == pytest.approx(20.0 + TIMES.alone(64, 4))


def test_a_second_device_is_used() -> None:
    arrivals = [wanted(steps=50) for _ in range(32)]
    one, two = (took(Served(TIMES, devices, slack=4), arrivals).until for devices in (1, 2))
    assert two < 0.6 * one


@given(
    st.integers(0, 99), st.integers(1, 4), st.floats(0.2, 3.0), st.booleans(),
    st.sampled_from([*simulate.WAYS]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_everything_is_answered_once_and_no_device_works_more_than_all_the_time(
    seed: int, devices: int, load: float, warm: bool, way: str
) -> None:
    rate = load * devices / 40
    arrivals = list(trace(MIX, 60, rate, seed))
    drawing = simulate.WAYS[way](TIMES, devices, 4.0)
    totals = drawing.run(arrivals, ["model 0", "model 1"] if warm else [])
    assert len(totals.latencies[False]) == sum(not each.low for each in arrivals)
    assert len(totals.latencies[True]) == sum(each.low for each in arrivals)
    assert totals.calls == sum(each.steps for each in arrivals)
    assert totals.busy <= devices * totals.until
    assert min(totals.latencies[False], default=1) >= TIMES.alone(64, 2) - 1e-9
    if isinstance(drawing, Served):
        assert (drawing._queue.waiting, drawing._queue.running) == (0, 0)
        assert max(map(drawing._router.wait_s, range(devices))) < 1e-6


def test_a_trace_has_its_rate_its_bursts_and_its_shares() -> None:
    mix = replace(MIX, long_share=0.1, low_share=0.3)
    arrivals = list(trace(mix, 40_000, 5.0, seed=3))
    assert [each.at for each in arrivals] == sorted(each.at for each in arrivals)
    assert 40_000 / arrivals[-1].at == pytest.approx(5.0, rel=0.05)
    assert mean(each.steps == mix.long_steps for each in arrivals) == pytest.approx(0.1, abs=0.01)
    assert mean(each.low for each in arrivals) == pytest.approx(0.3, abs=0.01)
    bursting = [each for each in arrivals if abs(each.at % PERIOD_S - PERIOD_S / 2) < BURST_S / 2]
    calm = (len(arrivals) - len(bursting)) / (PERIOD_S - BURST_S)
    assert len(bursting) / BURST_S / calm == pytest.approx(BURST, rel=0.1)
    assert arrivals == list(trace(mix, 40_000, 5.0, seed=3)), "by the seed alone"


def test_results_are_written_and_plotted(tmp_path: Path) -> None:
    found = simulate.simulate(simulate.Traces(TIMES, MIX, 2, 40, 4.0, seed=1), (0.5, 1.0))
    assert [(each.load, each.way) for each in found] == [(load, way) for load in (0.5, 1.0) for way in simulate.WAYS]
    assert all(0 < each.use <= 1 and 0 <= each.met <= 1 and each.together >= 1 for each in found)
    paths = simulate.plotted(found, "two devices", tmp_path / "simulate")
    assert [path.suffix for path in paths] == [".png", ".svg"]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_times_are_made_of_what_workers_note(tmp_path: Path) -> None:
    """One picture alone, then two at once in shared passes; before 10 nothing counts."""
    noted = [
        [1.0, 2.0, "encode", 0, 1, [0]], [2.0, 3.0, "denoise", 16, 2, [0]], [3.0, 4.0, "denoise", 32, 2, [0]],
        [10.0, 10.5, "encode", 0, 2, [1, 2]],
        [11.0, 13.0, "denoise", 16, 4, [1, 2]], [13.5, 15.5, "denoise", 16, 4, [1, 2]],
        [16.0, 17.25, "denoise", 16, 2, [1]],
        [17.35, 17.85, "decode", 16, 1, [1]],
    ]  # fmt: skip
    times = simulate_check.times_of([noted], [(0.5, 4.5)], (10.0, 20.0))
    assert times.turn == pytest.approx(0.1)  # after a pass of one request, which ends when its pipeline has gone on
    assert times.between == pytest.approx({"encode": 0.2, "denoise 64": 0.2})
    assert times.passes["denoise 64"] == pytest.approx({4: 2.0, 2: 1.05})
    assert (times.begin, times.end) == (0.5, 0.5)
    assert set(times.spread["denoise 64"]) == {1.0}
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"figures": {"times": times.as_json()}}))
    assert StepTimes.read(path) == replace(times, pace=())
