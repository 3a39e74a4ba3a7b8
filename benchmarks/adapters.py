"""What LoRAs of requests cost: per step, and several at once over one LoRA at a time.

    python -m benchmarks.adapters [--model embedded] [--device cuda]

1. One forward pass of the denoiser, over the same one of the module without adapters: a LoRA that is loaded and not
   used; one LoRA on all rows; four LoRAs and none, each on rows of its own; another LoRA than the time before. On the
   CPU in CPU time of one thread, alternating.
2. Eight requests with four LoRAs and none, of different steps and guidance: all at once over those of one LoRA at a
   time. In pairs, of which each begins with the other kind than the one before, in time of the clock and of the CPU.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from benchmarks import models
from benchmarks.figures import Figure, arguments, figure, table, write
from benchmarks.overhead import clock
from sfumato.batching.adapted import Selection
from sfumato.batching.batcher import Batcher
from sfumato.batching.views import view
from sfumato.checkpoints import lora_files
from sfumato.engine import environment
from sfumato.loras import Lora
from sfumato.models.adapters import Adapters

RANK = 16
COUNT = 4
ROWS = 8


def files(pipeline: Any, folder: Path) -> list[Lora]:
    """LoRAs for the attention of the denoiser, as they are usually trained."""
    found = []
    for seed in range(COUNT):
        torch.manual_seed(seed)
        unet = type(pipeline.unet).from_config(pipeline.unet.config)
        unet.add_adapter(LoraConfig(r=RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        layers: Any = {"unet_lora_layers": get_peft_model_state_dict(unet)}
        pipeline.save_lora_weights(folder, weight_name=f"{seed}.safetensors", **layers)
        path = folder / f"{seed}.safetensors"
        found.append(Lora(str(seed), 1.0, None, str(path), *lora_files.digests(path)))
    return found


def per_step(pipeline: Any, loras: Sequence[Lora], device: str, side: int, repeats: int) -> dict[str, Figure]:
    """Name → seconds of a forward pass over that of the module itself."""
    unet, adapters, now = pipeline.unet, Adapters(), clock(device)
    given = {
        "sample": torch.randn(ROWS, 4, side // 8, side // 8, device=device, dtype=unet.dtype),
        "timestep": torch.full((ROWS,), 500, device=device),
        "encoder_hidden_states": torch.randn(
            ROWS, 77, unet.config.cross_attention_dim, device=device, dtype=unet.dtype
        ),
    }

    def timed(run: Callable[[], Any]) -> float:
        start = now()
        run()
        return now() - start

    def plain() -> Any:
        return unet(**given)

    plain()
    alone = [timed(plain) for _ in range(2 * repeats)]
    with adapters.use(pipeline, device, "m", loras) as selections:
        adapted = selections[id(unet)].adapted
        each = [Selection(adapted, (name,)) for name in selections[id(unet)].names]
        none = Selection(adapted, ())
        rows = [[*each, none][at % (COUNT + 1)] for at in range(ROWS)]
        turn = iter(range(10**9))
        variants: Mapping[str, Callable[[], Any]] = {
            "loaded, not used": plain,
            "one for all rows": lambda: adapted.run("__call__", each[:1], (), given),
            "four and none by row": lambda: adapted.run("__call__", rows, (), given),
            "another each time": lambda: adapted.run("__call__", [each[next(turn) % COUNT]], (), given),
        }
        ratios: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(repeats):
            for name, run in variants.items():
                base = timed(plain)
                ratios[name].append(timed(run) / base)
    after = [timed(plain) for _ in range(2 * repeats)]
    answer = {name: figure(values) for name, values in ratios.items()}
    answer["without, after over before"] = figure([b / a for a, b in zip(sorted(alone), sorted(after), strict=True)])
    return answer


def at_once(pipeline: Any, loras: Sequence[Lora], device: str, name: str, repeats: int) -> dict[str, Any]:
    """Rate of eight requests at once over one LoRA at a time, by either clock, and the mean batches of the denoiser."""
    adapters = Adapters()
    kinds: list[list[Lora]] = [*([lora] for lora in loras), []]
    requests = [(kinds[at % len(kinds)], each) for at, each in enumerate(models.mixed(name, ROWS, seed=5))]

    def draw(own: Sequence[Lora], call: Mapping[str, Any]) -> Any:
        with adapters.use(pipeline, device, "m", own) as selections:
            return view(pipeline, adapters=selections)(**call)

    def together(some: Sequence[tuple[Sequence[Lora], Any]]) -> None:
        batcher.prompt_cache.clear()
        tasks = [batcher.submit(functools.partial(draw, own, models.arguments(each))) for own, each in some]
        while batcher.step():
            pass
        for task in tasks:
            if task.outcome and task.outcome.error:
                raise task.outcome.error

    def all_at_once() -> None:
        together(requests)

    def one_lora_at_a_time() -> None:
        for own in kinds:
            together([each for each in requests if each[0] is own])

    def mean_batch(run: Callable[[], None]) -> float:
        batcher.counts.clear()
        run()
        return round(batcher.counts["unet"].calls / batcher.counts["unet"].forwards, 2)

    batcher = Batcher(max_rows=2 * ROWS)
    clocks: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
    ratios: dict[str, list[float]] = {what: [] for what in clocks}
    variants = (one_lora_at_a_time, all_at_once)
    with adapters.use(pipeline, device, "m", loras):
        for variant in variants:
            variant()  # the proofs
        batches = {"mean batch": mean_batch(all_at_once), "mean batch, one at a time": mean_batch(one_lora_at_a_time)}
        for pair in range(repeats):
            took: dict[Any, dict[str, float]] = {}
            for variant in variants if pair % 2 else reversed(variants):
                start = {what: now() for what, now in clocks.items()}
                variant()
                took[variant] = {what: now() - start[what] for what, now in clocks.items()}
            for what in clocks:
                ratios[what].append(took[one_lora_at_a_time][what] / took[all_at_once][what])
    return {**{what: figure(values) for what, values in ratios.items()}, **batches}


def run(device: str, repeats: int, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for name in names:
            pipeline = models.Plain(models.config(name, Path(folder), device), device).pipeline
            loras = files(pipeline, Path(folder))
            steps = per_step(pipeline, loras, device, models.SIZES[name], 3 * repeats)
            rate = at_once(pipeline, loras, device, name, repeats)
            rows = [(name, what, ratio) for what, ratio in steps.items()]
            rows += [(name, f"eight at once over one LoRA at a time: {what}", value) for what, value in rate.items()]
            print(table(("model", "what", "ratio"), rows), "\n", flush=True)
            figures[name] = {"step": steps, "rate": rate}
    print(write("adapters", device, figures))


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--model", choices=(*models.SIZES, "all"), default="all")
    options = parser.parse_args()
    environment.prepare()
    run(options.device, options.repeats, tuple(models.SIZES) if options.model == "all" else (options.model,))
