"""Mixed requests at the same time: the server's engine, the same without batching, and plain diffusers.

    python -m benchmarks.throughput [--device cuda] [--model embedded] [--concurrent 1 2 4 8 16]

N requests with different prompts, seeds, steps, guidance and schedulers arrive at once. Three ways to draw them
alternate: the engine (a worker process, as in `sfumato serve`), the same with `max_batch` 1, and a plain
pipeline in this process, one call after another. Rates are relative to plain diffusers in the same round.
"""

from __future__ import annotations

import asyncio
import io
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks import models
from benchmarks.figures import Figure, arguments, figure, percentile, table, write
from sfumato.config import ModelConfig
from sfumato.core import Done, Failed, Generation
from sfumato.engine import environment
from sfumato.engine.protocol import Engine
from sfumato.process.supervisor import Supervisor
from sfumato.settings import Settings

CONCURRENT = (1, 2, 4, 8, 16)
MIDDLE_CONCURRENT = (1, 4)
"""For the model whose pictures take seconds."""


@dataclass(frozen=True, slots=True)
class Round:
    """One way to draw N requests, once. All in seconds."""

    wall: float
    latencies: Sequence[float]


async def through(engine: Engine, config: ModelConfig, asked: Sequence[Generation]) -> Round:
    """All at once through an engine."""
    start = time.perf_counter()

    async def one(generation: Generation) -> float:
        async with aclosing(engine.submit(config, generation)) as events:
            async for event in events:
                last = event
        if isinstance(last, Failed):
            raise last.error
        assert isinstance(last, Done)
        return time.perf_counter() - start

    latencies = await asyncio.gather(*(one(generation) for generation in asked))
    return Round(time.perf_counter() - start, latencies)


def one_by_one(plain: models.Plain, asked: Sequence[Generation]) -> Round:
    """One after another with a plain pipeline, each written as PNG as the engine does."""
    start = time.perf_counter()
    latencies = []
    for generation in asked:
        plain.draw(generation).save(io.BytesIO(), "PNG")
        latencies.append(time.perf_counter() - start)
    return Round(latencies[-1], latencies)


@dataclass(frozen=True, slots=True)
class Result:
    """Results for one number of concurrent requests. Ratios are within a round; seconds are medians over the rounds."""

    concurrent: int
    over_plain: Figure
    """Pictures per second, over plain diffusers."""
    over_batch_1: Figure
    p50: dict[str, float]
    p95: dict[str, float]


def measure(config: ModelConfig, model: str, device: str, concurrent: Sequence[int], repeats: int) -> list[Result]:
    settings = Settings(device=device, log_level="error")
    plain = models.Plain(config, device)
    results = []
    with asyncio.Runner() as runner:
        engines = {"engine": Supervisor(settings), "batch 1": Supervisor(replace(settings, max_batch=1))}
        try:
            for engine in engines.values():
                runner.run(engine.start())
                runner.run(through(engine, config, models.mixed(model, 2, seed=1)))
            one_by_one(plain, models.mixed(model, 1, seed=1))
            for count in concurrent:
                rounds: dict[str, list[Round]] = {"engine": [], "batch 1": [], "plain": []}
                for repeat in range(repeats):
                    asked = models.mixed(model, count, seed=100 * count + repeat)
                    for name, engine in engines.items():
                        rounds[name].append(runner.run(through(engine, config, asked)))
                    rounds["plain"].append(one_by_one(plain, asked))
                results.append(_result(count, rounds))
                print(*row(results[-1]), flush=True)
        finally:
            for engine in engines.values():
                runner.run(engine.stop())
    return results


def _result(count: int, rounds: dict[str, list[Round]]) -> Result:
    def ratio(name: str) -> Figure:
        return figure([other.wall / ours.wall for ours, other in zip(rounds["engine"], rounds[name], strict=True)])

    def seconds(share: float) -> dict[str, float]:
        return {
            name: figure([percentile(one.latencies, share) for one in found]).median for name, found in rounds.items()
        }

    return Result(count, ratio("plain"), ratio("batch 1"), seconds(0.5), seconds(0.95))


HEAD = (
    "concurrent",
    "over plain",
    "over batch 1",
    "p50 s: engine",
    "batch 1",
    "plain",
    "p95 s: engine",
    "batch 1",
    "plain",
)


def row(result: Result) -> list[object]:
    latencies = [f"{found[name]:.2f}" for found in (result.p50, result.p95) for name in ("engine", "batch 1", "plain")]
    return [result.concurrent, result.over_plain, result.over_batch_1, *latencies]


def run(device: str, repeats: int, names: Sequence[str], concurrent: Sequence[int] = ()) -> None:
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            config = models.config(name, Path(folder), device)
            counts = concurrent or (CONCURRENT if name == "embedded" else MIDDLE_CONCURRENT)
            results = measure(config, name, device, counts, repeats)
            print(f"\n{name}, {models.SIZES[name]} pixels per side, {device}; rates, and waiting times in seconds")
            print(table(HEAD, [row(result) for result in results]))
            figures[name] = [asdict(result) for result in results]
    print(write("throughput", device, figures))


if __name__ == "__main__":
    environment.prepare()
    parser = arguments(__doc__)
    parser.add_argument("--model", choices=models.SIZES, action="append", help="may be repeated; all by default")
    parser.add_argument("--concurrent", type=int, nargs="*", default=())
    options = parser.parse_args()
    run(options.device, options.repeats, options.model or list(models.SIZES), options.concurrent)
