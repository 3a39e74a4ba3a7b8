"""The same picture: the built-in model by a runner against plain diffusers in fp32, over 50 prompts.

    python -m benchmarks.same_picture [--runner openvino] [--count 50]

Peak signal-to-noise ratio of each pair, in dB, and what the judge in `training/` sees in both. Both are drawn with the
same seed, half of the prompts being ones that training never showed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import models
from benchmarks.figures import Figure, arguments, figure, table, write
from sfumato.core import Generation
from sfumato.engine import environment
from sfumato.sampling import Sampling

SIDE, STEPS, GUIDANCE = 128, 16, 3.0


@dataclass(frozen=True, slots=True)
class Result:
    runner: str
    """As the recipes have it."""
    prompts: int
    psnr: Figure
    """In dB; `least` is the worst picture."""
    below_35: int
    other_subject: list[str]
    """Prompts of whose two pictures the judge names different objects or backgrounds."""


def prompts(count: int) -> list[str]:
    from training.evaluate import some_seen
    from training.vocabulary import held_out_pairs, prompt

    half = count // 2
    return [prompt(*pair) for pair in (*some_seen(half, 1), *sorted(held_out_pairs())[: count - half])]


def drawers(runner: str, folder: Path) -> tuple[Callable[[str, int], Any], Callable[[str, int], Any], set[str]]:
    """Plain diffusers, Sfumato with a runner, and the set of runners that its recipes name so far."""
    from sfumato.drawing.draw import draw
    from sfumato.models import load
    from sfumato.pictures.images import decoded
    from sfumato.runners.choice import Runners

    config = models.config("embedded", folder, "cpu")
    model, pipeline = (load.load(config, "cpu", lambda status: None) for _ in range(2))
    plain, runners, named = pipeline.pipeline, Runners(runner, folder), set[str]()

    def by_diffusers(text: str, seed: int) -> Any:
        return plain(
            text, width=SIDE, height=SIDE, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]  # fmt: skip

    def by_runner(text: str, seed: int) -> Any:
        sampling = Sampling(width=SIDE, height=SIDE, steps=STEPS, guidance_scale=GUIDANCE)
        chosen = runners.of(model.computing(), model.state.runners, None, None)
        done = draw(model, Generation("", text, seed, sampling), lambda *_: None, None, chosen)
        named.add(done.recipe.runner)
        return decoded(done.file)

    return by_diffusers, by_runner, named


def measure(runner: str, count: int) -> Result:
    from training.judge import Judge

    judge, ratios, other = Judge.load(), [], []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        by_diffusers, by_runner, named = drawers(runner, Path(folder))
        for seed, text in enumerate(prompts(count)):
            one, two = by_diffusers(text, seed).convert("RGB"), by_runner(text, seed).convert("RGB")
            error = float(np.mean((np.asarray(one, float) - np.asarray(two, float)) ** 2))
            ratios.append(10 * np.log10(255**2 / max(error, 1e-4)))
            seen = [(judge.object(each), judge.background(each)) for each in (one, two)]
            other += [text] if seen[0] != seen[1] else []
            print(f"{text}: {ratios[-1]:.1f} dB", flush=True)
    below = sum(ratio < 35 for ratio in ratios)
    return Result(", ".join(sorted(named)), count, figure(ratios), below, other)


if __name__ == "__main__":
    environment.prepare()
    parser = arguments(__doc__)
    parser.add_argument("--runner", default="openvino", help="as `accelerate` has it")
    parser.add_argument("--count", type=int, default=50, help="prompts")
    options = parser.parse_args()
    found = measure(options.runner, options.count)
    head = ("runner", "prompts", "dB", "below 35", "another subject")
    print(table(head, [(found.runner, found.prompts, found.psnr, found.below_35, len(found.other_subject))]))
    print(write(f"same-picture-{options.runner}", options.device, [found]))
