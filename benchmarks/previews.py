"""Cost of previews: a picture with three previews over the same picture without.

    python -m benchmarks.previews [--device cuda]

Alternating within one run: without, with three latent-to-RGB previews (the map was fitted when the model was
loaded), and with three by its own decoder. On a CPU in CPU time of one thread, which other load on the machine
affects less than the clock. Also the time for fitting the map.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.figures import arguments, figure, table, write
from sfumato.config import ModelConfig
from sfumato.engine import environment
from sfumato.sampling import Sampling

COUNT = 3

STEPS = {"embedded": 20, "middle": 8}


def measure(config: ModelConfig, model: str, device: str, repeats: int) -> dict[str, object]:
    import torch

    from sfumato.core import Generation, Preview
    from sfumato.drawing.draw import draw
    from sfumato.models import load
    from sfumato.previews.decode import cheap_decoder

    clock = time.process_time if device == "cpu" else time.perf_counter
    loaded = load.load(replace(config, threads=1), device, lambda status: None)
    fits = []
    for _ in range(repeats):
        start = clock()
        cheap_decoder(loaded.pipeline)
        fits.append(clock() - start)
    decoder = replace(loaded, preview_decoder=None)
    side = models.SIZES[model]
    plain = Generation(
        id="1", prompt="a red ball", seed=1, sampling=Sampling(steps=STEPS[model], width=side, height=side)
    )
    shown = replace(plain, previews=COUNT)
    ways: dict[str, tuple[Any, Generation]] = {
        "without": (loaded, plain),
        "previews": (loaded, shown),
        "previews by its decoder": (decoder, shown),
    }

    def seconds(way: str) -> float:
        which, asked = ways[way]
        got: list[Preview] = []
        gc.collect()  # not during a measurement
        start = clock()
        with torch.no_grad():
            draw(which, asked, lambda done, total: None, got.append)
        took = clock() - start
        assert len(got) == asked.previews
        return took

    for way in ways:
        seconds(way)
    took: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats):
        # Each is first, second and third equally often: a machine that warms up or is disturbed favours none.
        order = [*ways][repeat % 3 :] + [*ways][: repeat % 3]
        for way in order:
            took[way].append(seconds(way))
    without = took.pop("without")
    ratios = {
        f"{way} over without": figure([one / other for one, other in zip(found, without, strict=True)])
        for way, found in took.items()
    }
    medians = {
        f"{way} over without, of medians": round(statistics.median(found) / statistics.median(without), 4)
        for way, found in took.items()
    }
    return {**ratios, **medians, "seconds without": figure(without), "seconds to fit the map": figure(fits)}


def run(device: str, repeats: int, names: Sequence[str]) -> None:
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            figures[name] = measure(models.config(name, Path(folder), device), name, device, repeats)
            print(f"\n{name}, {device}: {COUNT} previews in {STEPS[name]} steps of {models.SIZES[name]} pixels")
            print(table(("what", "figure"), list(figures[name].items())))
    print(write("previews", device, figures))


if __name__ == "__main__":
    environment.prepare()
    parser = arguments(__doc__)
    parser.set_defaults(repeats=9)
    parser.add_argument("--model", choices=models.SIZES, action="append", help="may be repeated; both by default")
    options = parser.parse_args()
    run(options.device, options.repeats, options.model or list(models.SIZES))
