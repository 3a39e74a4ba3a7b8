"""Does the simulation agree with this machine? A trace, drawn by real workers and simulated.

    python -m benchmarks.simulate_check [--devices 2] [--requests 120] [--load 0.6] [--seed 1]
    python -m benchmarks.simulate_check --again FILE    simulate what FILE has once more, and measure nothing

The pictures of the built-in model are requested when the trace says, through the service and its queue, of one worker
or several (`cpu,cpu`). The same trace is then simulated with the times of the forward passes that these workers have
noted in the same run (`recorded_worker`), `RUNS` times with other dice: a figure of few pictures is chance to a large
part, in the measured run as in these. `results/simulate-check-N-cpu.json` has both, and the times.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.arrivals import Mix, Wanted, trace
from benchmarks.figures import arguments, percentile, table, write
from benchmarks.simulated import Served
from benchmarks.step_times import PACE_S, StepTimes
from sfumato.core import BATCH, INTERACTIVE
from sfumato.engine import environment
from sfumato.engine.protocol import Engine
from sfumato.process.devices import Devices
from sfumato.process.supervisor import Supervisor
from sfumato.sampling import Sampling
from sfumato.serving.catalog import EMBEDDED, Catalog
from sfumato.serving.planning import ImageRequest
from sfumato.serving.service import Service
from sfumato.settings import Settings

SIDES = (64, 128)
MIX = Mix(sides=[(64, 0.5), (128, 0.5)], steps=[(4, 0.4), (8, 0.4), (16, 0.2)], long_steps=40, callers=4)
ALONE = 5
"""Pictures that are drawn one after another, to know what is not a forward pass."""
SLACK = 4.0
QUANTILES = 20
RUNS = 40
"""Simulations of the trace, each with other times by chance."""


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass during the trace, in seconds."""

    at: float
    """From the beginning of the trace."""
    took: float
    alone: bool
    """Whether it was one request's, which ends when its pipeline has gone on."""

    def without(self, between: float) -> float:
        return max(1e-6, self.took - between * self.alone)


Passes = list[list[Any]]
"""As `recorded_worker` writes them."""


async def drawn(service: Service, wanted: Wanted, began: float, number: int) -> float:
    """Seconds from when it should arrive to its picture."""
    await asyncio.sleep(max(0.0, began + wanted.at - time.monotonic()))
    request = ImageRequest(
        prompts=[f"a red ball {number}"],
        n=1,
        seed=number,
        caller=wanted.caller,
        priority=BATCH if wanted.low else INTERACTIVE,
        sampling=Sampling(width=wanted.side, height=wanted.side, steps=wanted.steps, scheduler="euler"),
    )
    await service.draw(request)
    return time.monotonic() - began - wanted.at


def engine_of(settings: Settings, devices: int, folder: Path) -> Engine:
    worker = (sys.executable, "-m", "benchmarks.recorded_worker", str(folder))
    return Devices(settings, ["cpu"] * devices, worker) if devices > 1 else Supervisor(settings, worker)


async def measured(
    wanted: Sequence[Wanted], devices: int, folder: Path
) -> tuple[list[float], list[tuple[float, float]], tuple[float, float]]:
    """Latencies of the trace; begin and end of each picture drawn alone before; begin and end of the trace."""
    settings = Settings(data=folder, device="cpu", log_level="error", max_queue=100_000)
    service = Service(Catalog([EMBEDDED]), engine_of(settings, devices, folder), settings)
    await service.start()
    try:
        now = time.monotonic()
        warm = [Wanted(0.0, f"{n}", "", side, 4, False) for side in SIDES for n in range(8 * devices)]
        await asyncio.gather(*(drawn(service, each, now, n) for n, each in enumerate(warm)))
        alone = []
        for n in range(ALONE):
            now = time.monotonic()
            await drawn(service, Wanted(0.0, "", "", SIDES[-1], 8, False), now, 1000 + n)
            alone.append((now, time.monotonic()))
        began = time.monotonic()
        latencies = await asyncio.gather(*(drawn(service, each, began, 2000 + n) for n, each in enumerate(wanted)))
        return latencies, alone, (began, time.monotonic())
    finally:
        await service.stop()


def kind_of(kind: str, width: int, widths: Sequence[int]) -> str:
    return kind if kind == "encode" else f"{kind} {SIDES[widths.index(width)]}"


def times_of(workers: Sequence[Passes], alone: Sequence[tuple[float, float]], run: tuple[float, float]) -> StepTimes:
    """What the workers have noted during the trace, and what is not a forward pass of pictures drawn alone."""
    widths = sorted({each[3] for passes in workers for each in passes if each[3]})
    passes: defaultdict[str, defaultdict[int, list[Pass]]] = defaultdict(lambda: defaultdict(list))
    gaps: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    turns = []
    for noted in workers:
        begun = set[int]()
        for (start, end, name, width, rows, members), following in itertools.pairwise(noted):
            kind = kind_of(name, width, widths)
            begun.update(members)
            if run[0] <= start <= run[1]:
                passes[kind][rows].append(Pass(start - run[0], end - start, len(members) == 1))
                if not begun.issuperset(following[5]):
                    continue  # there may have been nothing to do
                if len(members) > 1:
                    gaps[kind].append((following[0] - end, len(members)))
                else:
                    turns.append(following[0] - end)
    turn = mean(turns or [0.0])
    hosts = {kind: [max(0.0, gap - turn) / count for gap, count in each] for kind, each in gaps.items()}
    everything = [host for each in hosts.values() for host in each] or [0.0]
    between = {kind: mean(hosts.get(kind) or everything) for kind in passes}
    known = {
        kind: {rows: mean(each.without(between[kind]) for each in same) for rows, same in by_rows.items()}
        for kind, by_rows in passes.items()
    }
    ratios = {
        kind: [
            (each.at, each.without(between[kind]) / by_rows[rows]) for rows in by_rows for each in passes[kind][rows]
        ]
        for kind, by_rows in known.items()
    }
    pace = _pace([each for of_kind in ratios.values() for each in of_kind])
    spread = {
        kind: _quantiles([ratio / pace[int(at / PACE_S)] for at, ratio in of_kind]) for kind, of_kind in ratios.items()
    }
    begins, ends = [], []
    for start, end in alone:
        own = [each for noted in workers for each in noted if start <= each[0] <= end]
        begins.append(own[0][0] - start)
        ends.append(end - own[-1][1])
    return StepTimes(known, between, mean(begins), mean(ends), turn=turn, spread=spread, pace=pace)


def _pace(ratios: Sequence[tuple[float, float]]) -> list[float]:
    """By `PACE_S` of the run: the mean of the ratios then; where there are none, as before."""
    by_window: defaultdict[int, list[float]] = defaultdict(list)
    for at, ratio in ratios:
        by_window[int(at / PACE_S)].append(ratio)
    pace = [1.0]
    for window in range(max(by_window) + 1):
        pace.append(mean(by_window[window]) if by_window[window] else pace[-1])
    return pace[1:]


def _quantiles(values: Sequence[float]) -> list[float]:
    """`QUANTILES` of them, equally likely, with a mean of 1."""
    chosen = [percentile(values, (at + 0.5) / QUANTILES) for at in range(QUANTILES)]
    return [each / mean(chosen) for each in chosen]


def figures_of(latencies: Sequence[tuple[Wanted, float]]) -> dict[str, float]:
    hurried = [took for wanted, took in latencies if not wanted.low]
    until = max(wanted.at + took for wanted, took in latencies)
    return {
        "mean s": mean(took for _, took in latencies),
        "p50 s, interactive": percentile(hurried, 0.5),
        "p95 s, interactive": percentile(hurried, 0.95),
        "mean s, interactive": mean(hurried),
        "mean s, batch": mean([took for wanted, took in latencies if wanted.low] or [0.0]),
        "pictures a second": len(latencies) / until,
    }


def simulated(wanted: Sequence[Wanted], times: StepTimes, devices: int) -> dict[str, list[float]]:
    """Each figure's values in `RUNS` simulations, in order."""
    runs = []
    for seed in range(RUNS):
        took: dict[Wanted, float] = {}
        on_answer = took.__setitem__
        Served(times, devices, slack=SLACK, seed=seed, on_answer=on_answer).run(wanted, ["model 0"])
        runs.append(figures_of([(each, took[each]) for each in wanted]))
    return {name: sorted(run[name] for run in runs) for name in runs[0]}


def compared(real: Mapping[str, float], foreseen: Mapping[str, Sequence[float]]) -> str:
    """Measured, simulated (median, least and most), and the ratio of the median."""
    rows = [
        (name, f"{real[name]:.2f}", f"{percentile(runs, 0.5):.2f} ({runs[0]:.2f} to {runs[-1]:.2f})",
         f"{percentile(runs, 0.5) / real[name]:.2f}")
        for name, runs in foreseen.items()
    ]  # fmt: skip
    return table(("", "measured", "simulated", "ratio"), rows)


def again(file: Path) -> None:
    """The simulation of a run that was measured before."""
    figures = json.loads(file.read_text())["figures"]
    options, times = figures["options"], figures["times"]
    passes = {kind: {int(rows): seconds for rows, seconds in each.items()} for kind, each in times["passes"].items()}
    wanted = list(trace(MIX, options["requests"], figures["rate"], options["seed"]))
    step_times = StepTimes(**{**times, "passes": passes})
    print(compared(figures["measured"], simulated(wanted, step_times, options["devices"])))


def run(devices: int, requests: int, load: float, seed: int, folder: Path) -> Mapping[str, Any]:
    probe = list(trace(MIX, 400, 1.0, seed))
    rate = load * devices / (asyncio.run(_alone_s(folder)) * mean(each.steps * each.side**2 for each in probe))
    wanted = list(trace(MIX, requests, rate, seed))
    with asyncio.Runner() as runner:
        latencies, alone, span = runner.run(measured(wanted, devices, folder))
    workers = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.stem.isdecimal()]
    times = times_of(workers, alone, span)
    real = figures_of(list(zip(wanted, latencies, strict=True)))
    foreseen = simulated(wanted, times, devices)
    print(f"\n{requests} pictures on {devices} of this machine's CPUs, {load} of what they draw one by one")
    print(compared(real, foreseen))
    options = {"devices": devices, "requests": requests, "load": load, "seed": seed}
    return {"options": options, "rate": rate, "measured": real, "simulated": foreseen, "times": times.as_json()}


async def _alone_s(folder: Path) -> float:
    """Seconds for each step and pixel of a picture that is drawn alone."""
    settings = Settings(data=folder, device="cpu", log_level="error")
    service = Service(Catalog([EMBEDDED]), Supervisor(settings), settings)
    await service.start()
    try:
        took = []
        for n in range(3):
            took.append(await drawn(service, Wanted(0.0, "", "", 128, 8, False), time.monotonic(), n))
        return min(took) / (8 * 128**2)
    finally:
        await service.stop()


if __name__ == "__main__":
    environment.prepare()
    parser = arguments(__doc__)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--load", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--again", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.again:
        again(options.again)
        sys.exit()
    with tempfile.TemporaryDirectory() as name:
        found = run(options.devices, options.requests, options.load, options.seed, Path(name))
    print(write(f"simulate-check-{options.devices}", "cpu", found))
