"""A short request that arrives behind long ones: how much longer it takes than alone.

    python -m benchmarks.latency [--device cuda]

Six requests of 50 steps are in flight; one of 4 steps arrives. Its time over its time on an idle engine, with the
default engine, with `max_batch` 1, and first come, first served (`max_active` 1), like servers that draw one
request after another.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

from benchmarks import models
from benchmarks.figures import arguments, figure, table, write
from sfumato.config import ModelConfig
from sfumato.core import Failed, Generation, Step
from sfumato.engine import environment
from sfumato.engine.protocol import Engine
from sfumato.process.supervisor import Supervisor
from sfumato.settings import Settings

LONG, LONG_STEPS, SHORT_STEPS = 6, 50, 4

VARIANTS: Mapping[str, Callable[[Settings], Settings]] = {
    "engine": lambda settings: settings,
    "batch 1": lambda settings: replace(settings, max_batch=1),
    "first come first served": lambda settings: replace(settings, max_active=1),
}


def wanted(model: str, id: str, steps: int, seed: int) -> Generation:
    asked = models.mixed(model, 1, seed)[0]
    return replace(asked, id=id, sampling=replace(asked.sampling, steps=steps, scheduler=None))


async def alone(engine: Engine, config: ModelConfig, asked: Generation) -> float:
    """Seconds from the request to its picture."""
    start = time.perf_counter()
    async with aclosing(engine.submit(config, asked)) as events:
        async for event in events:
            last = event
    if isinstance(last, Failed):
        raise last.error
    return time.perf_counter() - start


async def behind(engine: Engine, config: ModelConfig, asked: Generation, longs: Sequence[Generation], at: int) -> float:
    """The same while others are in flight: it arrives after their first `at` steps. They are then stopped."""
    under_way = asyncio.Event()
    heard = 0

    async def one(long: Generation) -> None:
        nonlocal heard
        async with aclosing(engine.submit(config, long)) as events:
            async for event in events:
                heard += isinstance(event, Step)
                if heard >= at:
                    under_way.set()

    tasks = [asyncio.create_task(one(long)) for long in longs]
    await under_way.wait()
    seconds = await alone(engine, config, asked)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return seconds


def measure(config: ModelConfig, model: str, device: str, repeats: int) -> dict[str, dict[str, object]]:
    base = Settings(device=device, log_level="error")
    ratios: dict[str, list[float]] = {name: [] for name in VARIANTS}
    solos: list[float] = []
    with asyncio.Runner() as runner:
        engines = {name: Supervisor(changed(base)) for name, changed in VARIANTS.items()}
        try:
            for engine in engines.values():
                runner.run(engine.start())
                runner.run(alone(engine, config, wanted(model, "warm", SHORT_STEPS, 0)))
            for repeat in range(repeats):
                longs = [wanted(model, f"long {at}", LONG_STEPS, seed=1000 * repeat + at) for at in range(LONG)]
                for name, engine in engines.items():
                    solo = runner.run(alone(engine, config, wanted(model, "solo", SHORT_STEPS, 10_000 + repeat)))
                    short = wanted(model, "short", SHORT_STEPS, 20_000 + repeat)
                    waited = runner.run(behind(engine, config, short, longs, at=10 + repeat))
                    # The engine alone again: the machine's load changes within a run.
                    solo_after = runner.run(alone(engine, config, wanted(model, "solo", SHORT_STEPS, 30_000 + repeat)))
                    solos += [solo, solo_after]
                    ratios[name].append(2 * waited / (solo + solo_after))
        finally:
            for engine in engines.values():
                runner.run(engine.stop())
    return {name: {"over solo": figure(found), "solo seconds": figure(solos)} for name, found in ratios.items()}


def run(device: str, repeats: int, names: Sequence[str]) -> None:
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            figures[name] = measure(models.config(name, Path(folder), device), name, device, repeats)
            print(f"\n{name}, {device}: {SHORT_STEPS} steps behind {LONG} times {LONG_STEPS}, over alone")
            print(table(("variant", "over solo"), [(way, found["over solo"]) for way, found in figures[name].items()]))
            print(f"alone: {figures[name]['engine']['solo seconds']} s")
    print(write("latency", device, figures))


if __name__ == "__main__":
    environment.prepare()
    parser = arguments(__doc__)
    parser.set_defaults(repeats=5)
    parser.add_argument("--model", choices=models.SIZES, action="append", help="may be repeated; embedded by default")
    options = parser.parse_args()
    run(options.device, options.repeats, options.model or ["embedded"])
