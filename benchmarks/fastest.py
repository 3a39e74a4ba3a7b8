"""Stable Diffusion 1.5 at full size through HTTP by the fastest runner, over plain diffusers in fp32; and a few steps.

    python -m benchmarks.fastest [--side 256] [--steps 8] [--repeats 3]

Random weights. The first ratio is of a picture with guidance: plain diffusers in fp32, in this process, over the server
with `dtype: bf16` and a runner. The others are of a picture in four steps without guidance, all through the server in
bf16: without tiny VAE and runner over with both, and over with one of them. Variants alternate within a round. Four
minutes at 256 pixels on two cores; 512 pixels take eight with two rounds.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.figures import Figure, arguments, figure, table, write
from sfumato.commands.bench.server import Server, running
from sfumato.engine import environment
from sfumato.serving.catalog import EMBEDDED

PROMPT = "a red ball"
FEW = 4
VARIANTS = {
    "eager": {"accelerate": "eager"},
    "tiny VAE": {"accelerate": "eager", "vae": "tiny"},
    "runner": {},
    "runner and tiny VAE": {"vae": "tiny"},
}
"""Model files, apart from what they have in common."""


@dataclass(frozen=True, slots=True)
class Result:
    side: int
    steps: int
    """Of a picture with guidance."""
    runner: str
    """As the picture's recipe says."""
    plain: Figure
    """Seconds of plain diffusers in fp32."""
    served: Figure
    """Seconds of the server, from request to PNG."""
    ratio: Figure
    few: dict[str, Figure]
    """Variant → seconds of a picture in four steps without guidance."""
    few_ratios: dict[str, Figure]
    """Variant → how many times as fast as `eager`."""


def built(folder: Path) -> None:
    """The pipeline and a tiny autoencoder, in bf16."""
    import diffusers as d
    from transformers import CLIPTextConfig, CLIPTextModel

    from benchmarks.gpu_models import DTYPE, SHAPES, made

    pipeline = SHAPES["sd15"].build("cpu")
    embedded = d.StableDiffusionPipeline.from_pretrained(EMBEDDED / "sfumato-tiny")
    tokenizer = embedded.tokenizer
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=tokenizer.model_max_length, **ends,
    )  # fmt: skip
    pipeline.register_modules(tokenizer=tokenizer, text_encoder=CLIPTextModel(text).to(DTYPE))
    pipeline.save_pretrained(folder / "weights")
    made("cpu", d.AutoencoderTiny).save_pretrained(folder / "tiny")


def model_files(folder: Path, runner: str) -> None:
    for name, fields in VARIANTS.items():
        given = {"accelerate": runner, "dtype": "bf16", **fields}
        if "vae" in given:
            given["vae"] = str(folder / "tiny")
        lines = [f"name: {name.replace(' ', '-')}", f"parameters: {{model: {folder / 'weights'}}}"]
        lines += [f"{key}: {value}" for key, value in given.items()]
        (folder / f"{name.replace(' ', '-')}.yaml").write_text("\n".join(lines) + "\n")


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    os.environ |= {"SFUMATO_RUNNERS": str(folder / "runners"), "SFUMATO_LOADED_MODELS": str(len(VARIANTS))}
    with running(folder) as server:
        yield server


def over_http(server: Server, variant: str, side: int, steps: int, guidance: float) -> Callable[[], float]:
    body = {"model": variant.replace(" ", "-"), "prompt": PROMPT, "size": f"{side}x{side}", "steps": steps,
            "guidance_scale": guidance, "seed": 1, "response_format": "b64_json"}  # fmt: skip

    def drawn() -> float:
        start = time.perf_counter()
        server.client.post("/v1/images/generations", json=body).raise_for_status()
        return time.perf_counter() - start

    return drawn


def by_diffusers(folder: Path, side: int, steps: int) -> Callable[[], float]:
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder / "weights", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def drawn() -> float:
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(1)
        pipeline(PROMPT, width=side, height=side, num_inference_steps=steps, guidance_scale=5.0, generator=generator)
        return time.perf_counter() - start

    return drawn


def measure(side: int, steps: int, repeats: int, runner: str) -> Result:
    with tempfile.TemporaryDirectory(prefix="sfumato-fastest-") as name:
        folder = Path(name)
        built(folder)
        model_files(folder, runner)
        with served(folder) as server:
            few = {variant: over_http(server, variant, side, FEW, 1.0) for variant in VARIANTS}
            for variant in VARIANTS:  # loads, converts, compares
                print(f"{variant}: first picture in {over_http(server, variant, side, 1, 1.0)():.1f} s", flush=True)
            over_http(server, "runner", side, 1, 5.0)()
            facts = server.client.get("/v1/models/runner").json()["sfumato"]["runners"]
            rounds = []
            for _ in range(repeats):
                rounds.append({variant: draw() for variant, draw in few.items()})
                print(rounds[-1], flush=True)
            plain, quick = by_diffusers(folder, side, steps), over_http(server, "runner", side, steps, 5.0)
            pairs = []
            for _ in range(repeats):
                pairs.append((plain(), quick()))
                print(pairs[-1], flush=True)
    return Result(
        side, steps, ", ".join(f"{each['module']} {each['runner']}" for each in facts),
        figure([slow for slow, _ in pairs]), figure([fast for _, fast in pairs]),
        figure([slow / fast for slow, fast in pairs]),
        {variant: figure([each[variant] for each in rounds]) for variant in VARIANTS},
        {variant: figure([each["eager"] / each[variant] for each in rounds]) for variant in VARIANTS},
    )  # fmt: skip


if __name__ == "__main__":
    environment.prepare()
    parser = arguments(__doc__)
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--steps", type=int, default=8, help="of the picture with guidance")
    parser.add_argument("--runner", default="openvino", help="as `accelerate` has it")
    options = parser.parse_args()
    found = measure(options.side, options.steps, options.repeats, options.runner)
    print(found.runner)
    print(table(("side", "steps", "plain fp32 s", "served s", "ratio"),
                [(found.side, found.steps, found.plain, found.served, found.ratio)]))  # fmt: skip
    print(table(("four steps, no guidance", "seconds", "over eager"),
                [(variant, found.few[variant], found.few_ratios[variant]) for variant in VARIANTS]))  # fmt: skip
    print(write(f"fastest-{options.side}", options.device, [found]))
