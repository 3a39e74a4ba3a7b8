"""Mixed requests at the same time: several workers, one for each device, over one worker.

    python -m benchmarks.devices [--devices cpu,cpu] [--model embedded] [--concurrent 2 8 16]

N requests with different prompts, seeds, steps, guidance and schedulers arrive at once. The engine with all devices and
that with the first of them alternate; both have loaded the model everywhere. On a CPU each worker has one thread, as
`OMP_NUM_THREADS=1` makes it: two workers with two threads each would share two cores as one worker does.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import models
from benchmarks.figures import Figure, arguments, figure, table, write
from benchmarks.throughput import Round, through
from sfumato.config import ModelConfig
from sfumato.engine import environment
from sfumato.process.devices import Devices
from sfumato.process.supervisor import Supervisor
from sfumato.settings import Settings, device_names

CONCURRENT = (2, 8, 16)


@dataclass(frozen=True, slots=True)
class Result:
    """Of one number of concurrent requests; ratios within a round."""

    concurrent: int
    over_one: Figure
    """Pictures per second of all devices, over those of one."""
    steps: Sequence[int]
    """Denoising steps that each device has made so far."""


async def load_everywhere(engine: Devices, config: ModelConfig, model: str) -> None:
    """Bursts, until each device has drawn of one."""
    while not all(state.models.get(config.name) and state.stats.steps for state in engine.devices):
        await through(engine, config, models.mixed(model, 16, seed=1))


async def measure(
    config: ModelConfig, model: str, devices: Sequence[str], concurrent: Sequence[int], repeats: int
) -> list[Result]:
    settings = Settings(log_level="error")
    several, one = Devices(settings, devices), Supervisor(Settings(device=devices[0], log_level="error"))
    results = []
    try:
        await several.start()
        await one.start()
        await load_everywhere(several, config, model)
        await through(one, config, models.mixed(model, 16, seed=1))
        for count in concurrent:
            rounds: list[tuple[Round, Round]] = []
            for repeat in range(repeats):
                asked = models.mixed(model, count, seed=100 * count + repeat)
                rounds.append((await through(several, config, asked), await through(one, config, asked)))
            over = figure([alone.wall / together.wall for together, alone in rounds])
            results.append(Result(count, over, [state.stats.steps for state in several.devices]))
            print(count, over, flush=True)
    finally:
        await asyncio.gather(several.stop(), one.stop())
    return results


def run(devices: Sequence[str], repeats: int, model: str, concurrent: Sequence[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = models.config(model, Path(folder), devices[0])
        results = asyncio.run(measure(config, model, devices, concurrent, repeats))
    print(f"\n{model}, {', '.join(devices)}: rate over one device, and steps of each device so far")
    print(
        table(("concurrent", "over one", "steps"), [(each.concurrent, each.over_one, each.steps) for each in results])
    )
    print(write("devices", devices[0], {model: [asdict(each) for each in results]}))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    environment.prepare()
    parser = arguments(__doc__)
    parser.add_argument("--devices", type=device_names, default=["cpu", "cpu"], help="as the setting has them")
    parser.add_argument("--model", choices=models.SIZES, default="embedded")
    parser.add_argument("--concurrent", type=int, nargs="*", default=CONCURRENT)
    options = parser.parse_args()
    run(options.devices, options.repeats, options.model, options.concurrent)
