"""Keys that leave out work: CPU time of a picture with each over one without, and how far apart the two pictures are.

    python -m benchmarks.less_work [--repeats 3]

Guidance in a part of the steps: the built-in model (trained), and Stable Diffusion 1.5 at full size with random
weights. Feature caches: a Flux of 3 and 6 blocks with random weights, at 28 steps and diffusers' own settings; what a
cache does to a picture of trained weights, its dB do not say. Eight minutes on two cores that do nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from benchmarks.figures import Figure, arguments, figure, table, write
from sfumato.engine import environment

INTERVALS = {"0 to 0.5": (0.0, 0.5), "0.25 to 0.75": (0.25, 0.75), "0.1 to 0.9": (0.1, 0.9)}
MIDDLE = {
    "num_layers": 3, "num_single_layers": 6, "num_attention_heads": 8, "attention_head_dim": 64,
    "axes_dims_rope": (8, 28, 28), "joint_attention_dim": 512, "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Result:
    model: str
    variant: str
    cpu: Figure
    """CPU time of a picture over one without the key, within a round."""
    decibels: float | None
    """Peak signal-to-noise ratio of the two pictures."""


Draw = Callable[[], np.ndarray[Any, Any]]


def compared(model: str, plain: Draw, variants: Mapping[str, Draw], repeats: int) -> list[Result]:
    results: dict[str, list[float]] = {name: [] for name in variants}
    expected = plain()
    apart = {name: decibels(expected, draw()) for name, draw in variants.items()}
    for number in range(repeats):
        whole = seconds(plain)
        for name, draw in variants.items():
            results[name].append(seconds(draw) / whole)
        print(
            f"{model}, round {number + 1}: { {name: round(each[-1], 2) for name, each in results.items()} }", flush=True
        )
    return [Result(model, name, figure(ratios), apart[name]) for name, ratios in results.items()]


def seconds(draw: Draw) -> float:
    began = time.process_time()
    draw()
    return time.process_time() - began


def decibels(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float | None:
    error = float(np.mean((one - other) ** 2))
    return round(10 * float(np.log10(1 / error)), 1) if error else None


def limited(pipeline: Any, call: dict[str, Any], interval: tuple[float, float]) -> Draw:
    import torch

    from sfumato.batching import views
    from sfumato.batching.guidance import Interval
    from sfumato.drawing.steps import watch

    def draw() -> np.ndarray[Any, Any]:
        view, part = views.view(pipeline), Interval(*interval)
        views.limit_guidance(view, part)
        watch(view, call, lambda done, total: None, None, part)
        image: np.ndarray[Any, Any] = view(**call, generator=torch.Generator().manual_seed(1)).images[0]
        return image

    return draw


def guidance(device: str, repeats: int) -> list[Result]:
    import tempfile
    from pathlib import Path

    from benchmarks import models
    from benchmarks.gpu_models import SHAPES
    from sfumato.models import load

    with tempfile.TemporaryDirectory() as folder:
        built_in = load.load(models.config("embedded", Path(folder), device), device, lambda status: None).pipeline
    text = {"prompt": "a red circle on a blue background", "width": 128, "height": 128}
    full = SHAPES["sd15"]
    embeds = {**full.call(device, 0), "width": 256, "height": 256}
    del embeds["generator"]
    results: list[Result] = []
    for name, pipeline, call in (
        ("built-in", built_in, {**text, "num_inference_steps": 16, "guidance_scale": 3.0, "output_type": "np"}),
        ("Stable Diffusion 1.5, random", full.build(device), {**embeds, "num_inference_steps": 4}),
    ):
        pipeline.set_progress_bar_config(disable=True)
        drawn = {label: limited(pipeline, call, interval) for label, interval in INTERVALS.items()}
        results += compared(name, limited(pipeline, call, (0.0, 1.0)), drawn, repeats)
    return results


def caches(device: str, repeats: int) -> list[Result]:
    import torch

    from benchmarks.gpu_models import SHAPES
    from sfumato.config import readers
    from sfumato.models.feature_caches import CONFIGURATIONS, RATIOS

    shape = replace(SHAPES["flux"], side=192, text=(64, 512), steps=28, changes=MIDDLE)
    pipeline, call = shape.build(device), shape.call(device, 0)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"magcache": {"mag_ratios": RATIOS["FluxTransformer2DModel"]}}

    def drawer(kind: str | None) -> Draw:
        def draw() -> np.ndarray[Any, Any]:
            if kind:
                pipeline.transformer.enable_cache(CONFIGURATIONS[kind](**settings.get(kind, {})))
            try:
                image: np.ndarray[Any, Any] = pipeline(
                    **{**call, "generator": torch.Generator().manual_seed(1)}, guidance_scale=3.5
                ).images[0]
                return image
            finally:
                if kind:
                    pipeline.transformer.disable_cache()

        return draw

    call.pop("guidance_scale")
    return compared("Flux of 9 blocks, random", drawer(None), {kind: drawer(kind) for kind in readers.CACHES}, repeats)


def measure(device: str, repeats: int) -> list[Result]:
    import torch

    with torch.no_grad():
        return [*guidance(device, repeats), *caches(device, repeats)]


if __name__ == "__main__":
    environment.prepare()
    options = arguments(__doc__).parse_args()
    found = measure(options.device, options.repeats)
    rows = [(each.model, each.variant, each.cpu, each.decibels) for each in found]
    print(table(("model", "variant", "CPU time over without", "dB"), rows))
    print(write("less-work", options.device, [asdict(each) for each in found]))
