"""An arrival trace on many devices, in simulated time: the server, first come first served, and static batches.

    python -m benchmarks.simulate [--devices 8] [--requests 20000] [--loads 0.5 0.8 1.1 1.4]
    python -m benchmarks.simulate --devices 1000 --requests 1000000 --loads 0.9 --name simulate-1000

Requests arrive by a Poisson process with bursts of eight times as many, in mixed sizes and steps, some with very many
steps, some of the priority `batch`. A load of 1 is what the devices would draw one by one. The times of forward passes
are those that `benchmarks.simulate_check` has measured (or `--times FILE`); that run also says how far the simulation
may be believed. Deadlines of interactive requests are `--slack` times what they take alone; they are not sent, so
nothing is refused and everything is drawn.

Writes a table, `results/NAME.json`, and with matplotlib (the extra `bench`) `results/NAME.png` and `.svg`.
"""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from benchmarks.arrivals import Mix, trace
from benchmarks.figures import RESULTS, arguments, percentile, table, write
from benchmarks.simulated import Served, Simple, Totals
from benchmarks.step_times import StepTimes

TIMES = RESULTS / "simulate-check-1-cpu.json"
MIX = Mix(
    sides=[(64, 0.3), (128, 0.7)],
    steps=[(4, 0.2), (6, 0.15), (8, 0.2), (10, 0.15), (12, 0.1), (16, 0.1), (20, 0.1)],
)
LOADS = (0.5, 0.8, 1.1, 1.4)


@dataclass(frozen=True, slots=True)
class Result:
    """One way to draw one trace. Times in seconds."""

    way: str
    load: float
    rate: float
    """Pictures a second."""
    p50: float
    p95: float
    p99: float
    """Of interactive requests, as the two before."""
    batch_p95: float
    met: float
    """Share of interactive requests that met their deadline."""
    use: float
    """Part of the devices' time in which they computed or prepared to."""
    together: float
    """Requests for each forward pass of the denoiser."""
    took: float
    """CPU time of the simulation."""


Way = Callable[[StepTimes, int, float], "Served | Simple"]
WAYS: Mapping[str, Way] = {
    "server": lambda times, devices, slack: Served(times, devices, slack=slack),
    "first come first served": lambda times, devices, slack: Simple(times, devices, slack=slack, most=1),
    "static batches": lambda times, devices, slack: Simple(times, devices, slack=slack, most=8 // times.rows),
}


def result(way: str, load: float, totals: Totals, devices: int, took: float) -> Result:
    hurried, low = totals.latencies[False], totals.latencies[True]
    p50, p95, p99 = (percentile(hurried, share) for share in (0.5, 0.95, 0.99))
    return Result(
        way,
        load,
        rate=(len(hurried) + len(low)) / totals.until,
        p50=p50,
        p95=p95,
        p99=p99,
        batch_p95=percentile(low, 0.95) if low else 0.0,
        met=totals.met / len(hurried),
        use=totals.busy / (devices * totals.until),
        together=totals.calls / totals.passes,
        took=took,
    )


HEAD = ("load", "way", "a second", "p50 s", "p95 s", "p99 s", "batch p95 s", "met", "use", "together", "CPU s")


def row(one: Result) -> list[object]:
    seconds = (one.rate, one.p50, one.p95, one.p99, one.batch_p95, one.met, one.use, one.together)
    return [one.load, one.way, *(f"{value:.2f}" for value in seconds), f"{one.took:.0f}"]


@dataclass(frozen=True, slots=True)
class Traces:
    """What all ways draw, at several loads."""

    times: StepTimes
    mix: Mix
    devices: int
    requests: int
    slack: float
    seed: int

    def drawn(self, load: float, way: str) -> Result:
        began = time.process_time()
        alone = mean(self.times.alone(each.side, each.steps) for each in trace(self.mix, 20_000, 1.0, self.seed))
        arrivals = trace(self.mix, self.requests, load * self.devices / alone, self.seed)
        models = [f"model {n}" for n in range(self.mix.models)]
        totals = WAYS[way](self.times, self.devices, self.slack).run(arrivals, models)
        return result(way, load, totals, self.devices, time.process_time() - began)


def simulate(traces: Traces, loads: Sequence[float]) -> list[Result]:
    """Each way at each load in a process of its own, as many at a time as there are cores."""
    jobs = [(load, way) for load in loads for way in WAYS]
    # No cycles, and a million small objects.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"), initializer=gc.disable) as processes:
        results = []
        for one in processes.map(traces.drawn, *zip(*jobs, strict=True)):
            results.append(one)
            print(*row(one), file=sys.stderr, flush=True)
    return results


def plotted(results: Sequence[Result], title: str, stem: Path) -> list[Path]:
    """For each way p95, attainment and use by load. Nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    importlib.import_module("matplotlib").use("agg")  # not an import statement: the package is an extra
    pyplot = importlib.import_module("matplotlib.pyplot")
    names = {"p95": "p95 of interactive requests, seconds", "met": "deadlines met", "use": "use of the devices"}
    figure, all_axes = pyplot.subplots(1, len(names), figsize=(12, 3.6), layout="constrained")
    for axes, (name, label) in zip(all_axes, names.items(), strict=True):
        for way in WAYS:
            own = [each for each in results if each.way == way]
            axes.plot([each.load for each in own], [getattr(each, name) for each in own], marker="o", label=way)
        axes.set_ylabel(label)
        axes.set_xlabel("load (1: what they draw one by one)")
        axes.grid(alpha=0.3)
        axes.set_yscale("log") if name == "p95" else axes.set_ylim(0, 1.02)
    all_axes[0].legend()
    figure.suptitle(title)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return paths


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS)
    parser.add_argument("--models", type=int, default=1)
    parser.add_argument("--slack", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--times", type=Path, default=TIMES)
    parser.add_argument("--name", default="simulate")
    options = parser.parse_args()
    began = time.monotonic()
    mix = Mix(MIX.sides, MIX.steps, models=options.models)
    known = StepTimes.read(options.times)
    traces = Traces(known, mix, options.devices, options.requests, options.slack, options.seed)
    found = simulate(traces, options.loads)
    what = f"{options.requests} pictures, {options.devices} devices, {options.models} models"
    seconds = time.monotonic() - began
    print(f"\n{what}; deadlines {options.slack} times a picture alone; {seconds:.0f} s")
    print(table(HEAD, [row(each) for each in found]))
    given = {name: value for name, value in vars(options).items() if name not in ("times", "repeats")}
    print(write(options.name, "cpu", {"options": given, "mix": asdict(mix), "results": found, "seconds": seconds}))
    print(*plotted(found, what, RESULTS / f"{options.name}-cpu"))
