"""What a decode of 1024x1024 costs ten requests that draw: the longest time between two steps of any of them.

    python -m benchmarks.decode_beside [--model embedded] [--model sd15] [--repeats 3]

Over the longest one without the decode, in CPU time of the process, in one run: with the decode in one go, with one
that lets others compute after each second between two layers, and as it is. The built-in model draws 128 pixels, Stable
Diffusion 1.5 (full size, random weights, bf16) 256. For the latter ten minutes on two cores for each repeat.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch

from benchmarks import models
from benchmarks.figures import figure, table, write
from benchmarks.gpu_models import SHAPES
from sfumato.batching import divided_attention, interruption
from sfumato.batching.batcher import Batcher
from sfumato.batching.interruption import Slices
from sfumato.batching.views import view
from sfumato.engine import environment

BESIDE = 10
LARGE = 1024
SETTINGS: Mapping[str, Mapping[tuple[Any, str], Any]] = MappingProxyType({
    "in one go": {(interruption, "interruptible"): lambda module, method: False},
    "after each second, between layers": {(interruption, "SHORTEST_S"): 1.0, (divided_attention, "QUERIES"): 2**30},
    "as it is": {},
})  # fmt: skip
"""How the decode is computed: what is set for it."""


def embedded(folder: Path) -> tuple[Any, Callable[[int], dict[str, Any]]]:
    """The built-in model, and the arguments of a picture."""
    pipeline = models.Plain(models.config("embedded", folder, "cpu"), "cpu").pipeline
    size = {"width": 128, "height": 128, "num_inference_steps": 12}
    return pipeline, lambda seed: {"prompt": "a red ball", "guidance_scale": 3.0, **size}


def sd15(folder: Path) -> tuple[Any, Callable[[int], dict[str, Any]]]:
    """Stable Diffusion 1.5, without text encoder."""
    pipeline = SHAPES["sd15"].build("cpu")
    pipeline.set_progress_bar_config(disable=True)
    size = {"width": 256, "height": 256, "num_inference_steps": 3}
    return pipeline, lambda seed: SHAPES["sd15"].call("cpu", seed) | size


MODELS = {"embedded": embedded, "sd15": sd15}


def longest_gap(pipe: Any, call: Callable[[int], dict[str, Any]], *, decode: bool) -> tuple[float, float]:
    """The longest seconds between two steps of one of `BESIDE` requests, and the seconds until all is done."""
    batcher = Batcher(slices=Slices(_seconds))
    gaps: list[float] = []
    vae, latest = pipe.vae, 0
    side = LARGE // 2 ** (len(vae.config.block_out_channels) - 1)
    latents = torch.randn(1, vae.config.latent_channels, side, side, dtype=vae.dtype)

    def drawing(seed: int) -> None:
        last = 0.0

        def at_step(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            nonlocal last, latest
            now, latest = _seconds(), max(latest, step)
            if step:
                gaps.append(now - last)
            last = now
            return {}

        given = call(seed) | {"generator": torch.Generator().manual_seed(seed), "output_type": "latent"}
        view(pipe)(**given, callback_on_step_end=at_step, callback_on_step_end_tensor_inputs=[])

    for seed in range(BESIDE):
        batcher.submit(lambda seed=seed: drawing(seed))  # type: ignore[misc]
    began = _seconds()
    while batcher.step():
        if decode and latest:  # it begins in the second step, so that all have others behind it
            decode = False
            batcher.submit(lambda: view(pipe).vae.decode(latents))
    return max(gaps), _seconds() - began


def _seconds() -> float:
    """CPU time of the process by thread, which the machine's other load hardly changes."""
    return time.process_time() / torch.get_num_threads()


def measure(name: str, folder: Path, settings: Sequence[str], repeats: int) -> dict[str, Any]:
    pipe, call = MODELS[name](folder)
    if name == "embedded":  # what its first pictures import and prove is as long as a step
        longest_gap(pipe, call, decode=False)
    rounds: list[dict[str, float]] = []
    whole: list[dict[str, float]] = []
    for _ in range(repeats):
        without, alone = longest_gap(pipe, call, decode=False)
        rounds.append({})
        whole.append({})
        print(f"{name}: without the decode {without:.2f} s, all {alone:.1f} s", flush=True)
        for setting in settings:
            with ExitStack() as stack:
                for (owner, attribute), value in SETTINGS[setting].items():
                    stack.enter_context(mock.patch.object(owner, attribute, value))
                gap, all_s = longest_gap(pipe, call, decode=True)
            print(f"{name}: {setting}: {gap:.2f} s, all {all_s:.1f} s", flush=True)
            rounds[-1][setting], whole[-1][setting] = gap / without, all_s / alone
    return {
        setting: {"longest step": figure([each[setting] for each in rounds]),
                  "all": figure([each[setting] for each in whole])}
        for setting in settings
    }  # fmt: skip


if __name__ == "__main__":
    environment.prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--setting", choices=SETTINGS, action="append")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        found = {
            name: measure(name, Path(folder), options.setting or [*SETTINGS], options.repeats)
            for name in options.model or MODELS
        }
    for name, by_setting in found.items():
        print(f"\n{name}: longest step of {BESIDE} beside a decode of {LARGE}, and the time for all, over without")
        print(table(("", "longest step", "all"), [(each, *row.values()) for each, row in by_setting.items()]))
    print(write("decode-beside" if len(found) > 1 else f"decode-beside-{next(iter(found))}", "cpu", found))
