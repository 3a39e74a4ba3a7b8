"""A picture of 4 steps that arrives behind three clips of 50: how much longer it takes than alone.

    python -m benchmarks.clips_beside [--device cuda] [--repeats 5]

The built-in model and diffusers' tiny Wan in one engine, with clips of several sizes. Over the mean of two drawings on
the idle engine, before and after: by the clock, and in CPU time of the engine's thread, which the machine's other load
hardly changes. The picture arrives after the clips' fifth step or a later one, or when their last step is done, so that
the clips are decoded and their files are encoded meanwhile.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path

from benchmarks.figures import arguments, figure, table, write
from benchmarks.latency import wanted
from sfumato.config import ModelConfig
from sfumato.core import Failed, Generation, Step
from sfumato.engine import environment
from sfumato.engine.local import Local
from sfumato.sampling import Sampling
from sfumato.serving.catalog import EMBEDDED, Catalog
from sfumato.settings import Settings

CLIPS, CLIP_STEPS, PICTURE_STEPS = 3, 50, 4
SIZES: Mapping[str, tuple[int, int]] = {
    "64x64, 17 frames": (64, 17), "128x128, 33 frames": (128, 33), "256x256, 33 frames": (256, 33)
}  # fmt: skip
ARRIVALS = ("between steps", "at the decode")


def film(folder: Path) -> ModelConfig:
    """diffusers' own tiny Wan, with random weights."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from support.families_moving import wan

    wan().save_pretrained(folder / "weights")
    (folder / "film.yaml").write_text("name: film\nparameters: {model: weights}\n")
    return Catalog([folder]).get("film")


def clip(id: str, size: str, steps: int, seed: int) -> Generation:
    side, frames = SIZES[size]
    sampling = Sampling(width=side, height=side, num_frames=frames, fps=8, steps=steps)
    return Generation(id=id, prompt="a cat walks", seed=seed, sampling=sampling, format="webp")


async def drawn(engine: Local, config: ModelConfig, asked: Generation) -> tuple[float, float]:
    """Seconds from the request to its result: by the clock, and in CPU time of the engine's thread."""
    began, cpu_began = time.perf_counter(), _loop_s()
    async with aclosing(engine.submit(config, asked)) as events:
        async for event in events:
            last = event
    if isinstance(last, Failed):
        raise last.error
    return time.perf_counter() - began, _loop_s() - cpu_began


def _loop_s() -> float:
    (loop,) = (each for each in threading.enumerate() if each.name == "sfumato-loop")
    assert loop.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(loop.ident))


async def behind(
    engine: Local,
    config: ModelConfig,
    longs: Sequence[Generation],
    at: int,
    work: Callable[[], Awaitable[tuple[float, float]]],
) -> tuple[float, float]:
    """What `work` says, begun once `at` steps of each of `longs` are done; these are then stopped."""
    under_way = asyncio.Event()
    steps = dict.fromkeys((each.id for each in longs), 0)

    async def one(long: Generation) -> None:
        async with aclosing(engine.submit(config, long)) as events:
            async for event in events:
                steps[long.id] += isinstance(event, Step)
                if min(steps.values()) >= at:
                    under_way.set()

    tasks = [asyncio.create_task(one(long)) for long in longs]
    await under_way.wait()
    seconds = await work()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return seconds


async def measure(engine: Local, clips: ModelConfig, size: str, repeats: int) -> Mapping[str, object]:
    picture = Catalog([EMBEDDED]).get("sfumato-tiny")

    async def alone(seed: int) -> tuple[float, float]:
        return await drawn(engine, picture, wanted("embedded", f"short {seed}", PICTURE_STEPS, seed))

    await alone(1)
    await asyncio.gather(*(drawn(engine, clips, clip(f"warm {each}", size, 2, each)) for each in range(CLIPS)))
    ratios: dict[str, list[float]] = {f"{each}, {clock}": [] for each in ARRIVALS for clock in ("clock", "CPU")}
    solos: list[float] = []
    for repeat in range(repeats):
        for arrival, steps, at in zip(ARRIVALS, (CLIP_STEPS, 4), (5 + repeat, 4), strict=True):
            seed = 1000 * (repeat + 1)
            longs = [clip(f"long {arrival} {seed + each}", size, steps, seed + each) for each in range(CLIPS)]
            before = await alone(seed + 100)
            waited = await behind(engine, clips, longs, at, lambda seed=seed: alone(seed))  # type: ignore[misc]
            after = await alone(seed + 200)
            solos += [before[0], after[0]]
            for clock, *seconds in zip(("clock", "CPU"), before, waited, after, strict=True):
                ratios[f"{arrival}, {clock}"].append(2 * seconds[1] / (seconds[0] + seconds[2]))
                print(f"{size}, {arrival}, {clock}: {ratios[f'{arrival}, {clock}'][-1]:.2f}", flush=True)
    return {name: figure(found) for name, found in ratios.items()} | {"alone, seconds": figure(solos)}


async def run(device: str, repeats: int, sizes: Sequence[str]) -> dict[str, Mapping[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        clips = film(Path(folder))
        engine = Local(Settings(device=device, log_level="error", loaded_models=2, data=Path(folder) / "data"))
        await engine.start()
        try:
            return {size: await measure(engine, clips, size, repeats) for size in sizes}
        finally:
            await engine.stop()


if __name__ == "__main__":
    environment.prepare()
    parser = arguments(__doc__)
    parser.set_defaults(repeats=5)
    parser.add_argument("--size", choices=SIZES, action="append", help="may be repeated; all by default")
    options = parser.parse_args()
    figures = asyncio.run(run(options.device, options.repeats, options.size or [*SIZES]))
    print(f"\n{PICTURE_STEPS} steps behind {CLIPS} clips of {CLIP_STEPS}, over alone")
    rows = [(size, *found.values()) for size, found in figures.items()]
    print(table(("clips", *next(iter(figures.values()))), rows))
    print(write("clips-beside", options.device, figures))
