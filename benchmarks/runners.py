"""Runners: a forward pass of Stable Diffusion 1.5's UNet at full size, over the same by plain diffusers in fp32.

    python -m benchmarks.runners [--compile] [--sides 256 512]

Random weights, guidance on (two rows). The variants alternate within each repeat, so that a ratio compares neighbours
in time. The distance from fp32 is the root mean square of the difference over that of the output. Takes about five
minutes on two quiet cores, and with `--compile` three more.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, arguments, figure, table, write
from sfumato.engine import environment

ROWS, TEXT, WIDTH = 2, 77, 768
PLAIN = "plain fp32"


@dataclass(frozen=True, slots=True)
class Result:
    """Of one variant at one size."""

    side: int
    """Of the picture, in pixels."""
    variant: str
    seconds: Figure
    rate: Figure
    """Forward passes in the time that plain diffusers takes for one."""
    distance: float
    ready: float
    """Seconds before its first forward pass, conversion or compilation included."""


@dataclass(slots=True)
class Variant:
    name: str
    forward: Callable[[Mapping[str, Any]], Any]
    dtype: Any
    ready: float = 0.0


def unet(dtype: Any) -> Any:
    """In the shapes of Stable Diffusion 1.5; the same numbers for each dtype, up to rounding."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        module = UNet2DConditionModel(cross_attention_dim=WIDTH, sample_size=64)
    module = module.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            torch.nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
    return module.to(dtype).eval()


def call(side: int) -> dict[str, Any]:
    import torch

    torch.manual_seed(side)
    latents = torch.randn(ROWS, 4, side // 8, side // 8)
    return {"sample": latents, "timestep": torch.tensor(481), "encoder_hidden_states": torch.randn(ROWS, TEXT, WIDTH)}


def variants(folder: Path, compiled: bool) -> list[Variant]:
    import torch

    from sfumato.runners.background import Background
    from sfumato.runners.openvino import OpenVino

    full, half = unet(torch.float32), unet(torch.bfloat16)
    made = [Variant(PLAIN, lambda asked: full(**asked)[0], torch.float32)]
    for name, module, dtype in (("fp32", full, torch.float32), ("bf16", half, torch.bfloat16)):
        runner = OpenVino(module, folder, torch.get_num_threads(), Background())
        made.append(Variant(f"openvino {name}", _by(runner), dtype))
    made.append(Variant("eager bf16", lambda asked: half(**asked)[0], torch.bfloat16))
    if compiled:
        by_compiler: Any = torch.compile(half, dynamic=True)
        made.append(Variant("compile bf16", lambda asked: by_compiler(**asked)[0], torch.bfloat16))
    return made


def _by(runner: Any) -> Callable[[Mapping[str, Any]], Any]:
    def forward(asked: Mapping[str, Any]) -> Any:
        asked = {**asked, "return_dict": False}
        runner.prepare("__call__", (), asked, wait=True)
        (output,), name = runner.run("__call__", (), asked)
        if name == "eager":
            raise RuntimeError(f"OpenVINO does not serve this: {runner.state('unet')}")
        return output

    return forward


def measure(sides: Sequence[int], repeats: int, compiled: bool) -> list[Result]:
    import torch

    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        made = variants(Path(folder), compiled)
        for side in sides:
            outputs: dict[str, Any] = {}
            for variant in made:  # conversion, compilation, kernels for this size
                start = time.perf_counter()
                outputs[variant.name] = variant.forward(_in(call(side), variant.dtype)).float()
                variant.ready = time.perf_counter() - start
                gc.collect()
            seconds = _alternating(made, side, repeats)
            exact = outputs[PLAIN]
            for variant in made:
                distance = (outputs[variant.name] - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
                rates = [plain / own for plain, own in zip(seconds[PLAIN], seconds[variant.name], strict=True)]
                results.append(
                    Result(side, variant.name, figure(seconds[variant.name]), figure(rates), float(distance),
                           round(variant.ready, 1))
                )  # fmt: skip
                print(*row(results[-1]), flush=True)
    return results


def _alternating(made: Sequence[Variant], side: int, repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {variant.name: [] for variant in made}
    for _ in range(repeats):
        for variant in made:
            asked = _in(call(side), variant.dtype)
            start = time.perf_counter()
            variant.forward(asked)
            seconds[variant.name].append(time.perf_counter() - start)
    return seconds


def _in(asked: dict[str, Any], dtype: Any) -> dict[str, Any]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in asked.items()}


HEAD = ("side", "variant", "seconds", "rate over plain fp32", "distance from fp32", "ready after s")


def row(result: Result) -> list[object]:
    distance = f"{result.distance:.1e}"
    return [result.side, result.variant, result.seconds, result.rate, distance, result.ready]


if __name__ == "__main__":
    environment.prepare()
    parser = arguments(__doc__)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile, too")
    parser.add_argument("--sides", type=int, nargs="*", default=(256, 512), help="pixels per side")
    options = parser.parse_args()
    found = measure(options.sides, options.repeats, options.compile)
    print(table(HEAD, [row(result) for result in found]))
    print(write("runners", options.device, [asdict(result) for result in found]))
