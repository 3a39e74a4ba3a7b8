"""Stable Diffusion 1.5 at full size with a few steps: a picture with the tiny VAE, over one with its own.

    python -m benchmarks.tiny_vae [--side 512] [--steps 4]

Random weights in bf16, no guidance, one picture at a time, in alternating order. Three minutes on two cores.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.figures import Figure, arguments, figure, table, write
from sfumato.engine import environment


@dataclass(frozen=True, slots=True)
class Result:
    side: int
    steps: int
    own: Figure
    tiny: Figure
    """Seconds for a picture."""
    decoded: Figure
    """Seconds of it in which the model's own VAE decodes."""
    ratio: Figure
    """Of the first two, within a round."""


def measure(device: str, side: int, steps: int, repeats: int) -> Result:
    import torch
    from diffusers import AutoencoderTiny

    from benchmarks.gpu_models import SHAPES, made

    shape = SHAPES["sd15"]
    pipeline = shape.build(device)
    pipeline.set_progress_bar_config(disable=True)
    vaes = {"own": pipeline.vae, "tiny": made(device, AutoencoderTiny)}
    call: dict[str, Any] = {
        **{name: value for name, value in shape.call(device, 0).items() if not name.startswith("negative")},
        "width": side, "height": side, "num_inference_steps": steps, "guidance_scale": 1.0,
    }  # fmt: skip

    def drawn(name: str) -> float:
        pipeline.vae = vaes[name]
        start = time.perf_counter()
        pipeline(**call)
        return time.perf_counter() - start

    def decoded() -> float:
        latents = torch.randn(1, 4, side // 8, side // 8, dtype=pipeline.unet.dtype, device=device)
        start = time.perf_counter()
        vaes["own"].decode(latents).sample.cpu()
        return time.perf_counter() - start

    with torch.no_grad():
        for name in vaes:  # kernels for these sizes
            drawn(name)
        rounds = [(drawn("own"), drawn("tiny"), decoded()) for _ in range(repeats)]
    own, tiny, alone = map(list, zip(*rounds, strict=True))
    ratios = [slow / quick for slow, quick, _ in rounds]
    return Result(side, steps, figure(own), figure(tiny), figure(alone), figure(ratios))


if __name__ == "__main__":
    environment.prepare()
    parser = arguments(__doc__)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    found = measure(options.device, options.side, options.steps, options.repeats)
    print(table(("side", "steps", "own VAE s", "tiny VAE s", "decoding s", "ratio"),
                [(found.side, found.steps, found.own, found.tiny, found.decoded, found.ratio)]))  # fmt: skip
    print(write("tiny-vae", options.device, [asdict(found)]))
