"""What the server adds to a picture: one request through HTTP, over `pipe()` and a PNG, in CPU time.

    python -m benchmarks.over_http [--model embedded] [--model sd15] [--repeats 3]

CPU time of the server's two processes over that of a thread of this one, alternating; one torch thread each. The
built-in model (128 pixels, 28 steps, four pictures a round), and Stable Diffusion 1.5 (full size, random weights, bf16,
256 pixels, 4 steps with guidance). Three minutes for the former, six for the latter.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import fastest, models
from benchmarks.figures import figure, table, write
from sfumato.commands.bench.server import running
from sfumato.engine import environment
from sfumato.serving.catalog import EMBEDDED

PROMPT = "a red ball"


@dataclass(frozen=True, slots=True)
class Measured:
    """A model, and the same picture by it both ways."""

    folder: Path
    """Of its model file."""
    pipeline: Any
    side: int
    steps: int
    guidance: float
    pictures: int
    """In a round: processes tell their CPU time to 10 ms."""


def embedded(folder: Path) -> Measured:
    pipeline = models.Plain(models.config("embedded", folder, "cpu"), "cpu").pipeline
    return Measured(EMBEDDED, pipeline, side=128, steps=28, guidance=3.0, pictures=4)


def sd15(folder: Path) -> Measured:
    from diffusers import StableDiffusionPipeline

    fastest.built(folder)
    files = folder / "models"
    files.mkdir()
    (files / "sd15.yaml").write_text(f"name: sd15\nparameters: {{model: {folder / 'weights'}}}\ndtype: bf16\n")
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "weights", torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    return Measured(files, pipeline, side=256, steps=4, guidance=5.0, pictures=1)


MODELS = {"embedded": embedded, "sd15": sd15}


def measure(name: str, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="sfumato-over-http-") as folder:
        model = MODELS[name](Path(folder))
        with running(model.folder) as server:
            (pid,) = map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
            size = f"{model.side}x{model.side}"
            body = {"prompt": PROMPT, "size": size, "steps": model.steps, "guidance_scale": model.guidance,
                    "response_format": "b64_json"}  # fmt: skip

            def through_http() -> None:
                for seed in range(model.pictures):
                    server.client.post("/v1/images/generations", json=body | {"seed": seed}).raise_for_status()

            def directly() -> None:
                for seed in range(model.pictures):
                    given = {"width": model.side, "height": model.side, "num_inference_steps": model.steps}
                    generator = torch.Generator().manual_seed(seed)
                    picture = model.pipeline(PROMPT, **given, guidance_scale=model.guidance, generator=generator)
                    picture.images[0].save(io.BytesIO(), "PNG")

            through_http()
            directly()
            rounds = [_round(pid, through_http, directly, at) for at in range(repeats)]
    ratios, shares = zip(*rounds, strict=True)
    return {"over pipe()": figure(ratios), "API process, of all": figure(shares)}


def _round(pid: int, through_http: Callable[[], None], directly: Callable[[], None], at: int) -> tuple[float, float]:
    """CPU time of the server over that of `pipe()`, and the share of the API's process in it."""
    first, second = (through_http, directly) if at % 2 else (directly, through_http)
    took: dict[Callable[[], None], tuple[float, float, float]] = {}
    for part in (first, second):
        before = seconds(pid), own_seconds(pid), own_seconds(os.getpid())
        part()
        after = seconds(pid), own_seconds(pid), own_seconds(os.getpid())
        took[part] = after[0] - before[0], after[1] - before[1], after[2] - before[2]
    served, api, _ = took[through_http]
    plain = took[directly][2]
    print(f"served {served:.2f} s, of which API {api:.2f} s; pipe() {plain:.2f} s", flush=True)
    return served / plain, api / served


def own_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


def seconds(pid: int) -> float:
    """CPU time of a process and its descendants so far."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own_seconds(pid) + sum(seconds(int(child)) for child in children)


if __name__ == "__main__":
    environment.prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with torch.no_grad():
        found = {name: measure(name, options.repeats) for name in options.model or MODELS}
    print(table(("model", "server over pipe()", "API process"), [(name, *row.values()) for name, row in found.items()]))
    print(write("over-http" if len(found) > 1 else f"over-http-{next(iter(found))}", "cpu", found))
