"""Overhead of the batcher: per module call, for a single request over a plain `pipe()`, and in memory.

    python -m benchmarks.overhead [--device cuda]

1. Microseconds per module call. The module does almost nothing, so this measures everything around it:
   describing the call, choosing, joining the arguments, splitting the output, switching. Sizes are those of Stable
   Diffusion 1.5 at 512x512 with guidance, and of FLUX.1 at 1024x1024.
2. One request through the batcher over the same pipeline called directly, alternating. On the CPU in CPU time of the
   thread, with one torch thread, so that the machine's other load does not matter; on a GPU in seconds.
3. Memory of a parked request: Python allocations besides tensors, and the growth of the process.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import models
from benchmarks.figures import Figure, arguments, figure, table, write
from sfumato.batching.batcher import Batcher
from sfumato.batching.verification import Verification
from sfumato.batching.views import View, view
from sfumato.engine import environment

CALLS = 200


class UNet(torch.nn.Module):
    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, return_dict: bool = True) -> Any:
        return (sample,)


class Transformer(torch.nn.Module):
    def forward(
        self, hidden_states: Any, timestep: Any, guidance: Any, pooled_projections: Any, encoder_hidden_states: Any,
        txt_ids: Any, img_ids: Any, joint_attention_kwargs: Any = None, return_dict: bool = True,
    ) -> Any:  # fmt: skip
        return (hidden_states,)


def stable_diffusion(module: Any, device: str) -> None:
    value, text = torch.randn(2, 4, 64, 64, device=device), torch.randn(2, 77, 768, device=device)
    for step in range(CALLS):
        module(value, torch.tensor(step, device=device), encoder_hidden_states=text, return_dict=False)


def flux(module: Any, device: str) -> None:
    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    value, text, pooled = made(1, 4096, 64), made(1, 512, 4096), made(1, 768)
    text_ids, image_ids = torch.zeros(512, 3, device=device), torch.zeros(4096, 3, device=device)
    for step in range(CALLS):
        module(
            hidden_states=value, timestep=torch.tensor([step / CALLS], device=device),
            guidance=torch.tensor([3.5], device=device), pooled_projections=pooled, encoder_hidden_states=text,
            txt_ids=text_ids, img_ids=image_ids, joint_attention_kwargs=None, return_dict=False,
        )  # fmt: skip


def clock(device: str) -> Callable[[], float]:
    if device == "cpu":
        return time.thread_time

    def seconds() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return seconds


# 1. per module call


def per_call(run: Callable[[Any, str], None], module: torch.nn.Module, requests: int, device: str) -> float:
    """Additional microseconds per module call and request over a direct call, without proofs."""
    now = clock(device)
    stand_in = View("").stand_in(module, "module")
    learning = Batcher(verification=Verification("always", frozenset()))
    for _ in range(2):
        learning.submit(lambda: run(stand_in, device))
    for _ in range(4):
        learning.step()
    learning.close(KeyboardInterrupt())

    start = now()
    run(module, device)
    direct = now() - start
    batcher = Batcher(
        max_rows=64, max_active=64, verification=Verification("unlisted", frozenset(learning.verification.proved))
    )
    for _ in range(requests):
        batcher.submit(lambda: run(stand_in, device))
    start = now()
    while batcher.step():
        pass
    return ((now() - start) / requests - direct) / CALLS * 1e6


# 2. a single request


@dataclass(frozen=True, slots=True)
class Single:
    """One request alone, over `pipe()`."""

    model: str
    call_ms: float
    """A call of the denoiser."""
    calls: int
    over_bare: Figure
    """1.02 means two per cent more."""
    us_per_call: Figure


def single(name: str, folder: Path, device: str, repeats: int) -> Single:
    now = clock(device)
    plain = models.Plain(models.config(name, folder, device), device)
    pipe = plain.pipeline
    batcher = Batcher()
    ratios, extra, bare_seconds, calls = [], [], [], 0

    def bare(seed: int) -> float:
        start = now()
        pipe(**call(seed))
        return now() - start

    def through(seed: int) -> float:
        start = now()
        task = batcher.submit(lambda: view(pipe)(**call(seed)))
        while batcher.step():
            pass
        seconds = now() - start
        assert task.outcome
        assert task.outcome.error is None
        return seconds

    def call(seed: int) -> dict[str, Any]:
        return {**models.arguments(models.mixed(name, 1, seed=3)[0]), "generator": torch.Generator().manual_seed(seed)}

    with torch.no_grad():
        bare(0), through(0)
        for repeat in range(repeats):
            batcher.prompt_cache.clear()  # else the batcher would gain from the prompt-embedding cache
            batcher.counts.clear()
            one, other = (bare, through) if repeat % 2 else (through, bare)
            first, second = one(repeat), other(repeat)
            plainly, heart = (first, second) if one is bare else (second, first)
            calls = sum(count.calls for count in batcher.counts.values())
            ratios.append(heart / plainly)
            extra.append((heart - plainly) / calls * 1e6)
            bare_seconds.append(plainly)
    call_ms = statistics.median(bare_seconds) / calls * 1e3
    return Single(name, round(call_ms, 2), calls, figure(ratios), figure(extra))


# 3. memory


def python_memory(device: str, count: int = 200) -> float:
    """KiB of Python objects of a parked request besides its tensors and its pipeline's own variables."""
    batcher = Batcher(max_active=count)
    stand_in = View("").stand_in(UNet().eval(), "module")
    value, text = torch.randn(2, 4, 64, 64, device=device), torch.randn(2, 77, 768, device=device)
    gc.collect()
    tracemalloc.start()
    for _ in range(count):
        batcher.submit(lambda: stand_in(value, 1, encoder_hidden_states=text))
    batcher.step()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    batcher.close(KeyboardInterrupt())
    return held / count / 1024


def process_memory(folder: Path, count: int = 64) -> float:
    """Growth of the process in KiB per request of the built-in model, parked at its third step; everything included."""
    pipe = models.Plain(models.config("embedded", folder, "cpu"), "cpu").pipeline
    asked = models.mixed("embedded", 8 + count, seed=7)

    def park(some: list[Any], count: int) -> Batcher:
        batcher = Batcher(max_active=count)
        for one in some:
            batcher.submit(lambda one=one: view(pipe)(**models.arguments(one)))  # type: ignore[misc]
        while batcher.counts["unet"].calls < 3 * count:
            batcher.step()
        return batcher

    with torch.no_grad():
        park(asked[:8], 8).close(KeyboardInterrupt())  # what torch and the allocator allocate once
        gc.collect()
        before = resident()
        batcher = park(asked[8:], count)
        held = resident() - before
        batcher.close(KeyboardInterrupt())
    return held / count / 1024


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def run(device: str, repeats: int) -> None:
    torch.set_num_threads(1)
    rows = []
    with torch.no_grad():
        for name, calling, module in (("stable diffusion", stable_diffusion, UNet()), ("flux", flux, Transformer())):
            for requests in (1, 2, 8):
                found = figure([per_call(calling, module.eval().to(device), requests, device) for _ in range(5)])
                rows.append((name, requests, found))
    print(table(("shape", "requests", "µs per call and request"), rows), "\n")
    with tempfile.TemporaryDirectory() as folder:
        singles = [single(name, Path(folder), device, repeats) for name in models.SIZES]
        head = ("model", "ms per call", "calls", "over bare pipe()", "µs per call")
        print(
            table(head, [(one.model, one.call_ms, one.calls, one.over_bare, one.us_per_call) for one in singles]), "\n"
        )
        memory = {"python KiB": round(python_memory(device), 1), "process KiB": round(process_memory(Path(folder)), 1)}
    print(
        f"a parked request: {memory['python KiB']} KiB of Python besides tensors; the process grows by "
        f"{memory['process KiB']} KiB, including the tensors of a 128x128 picture"
    )
    per = [{"shape": name, "requests": requests, "us": asdict(found)} for name, requests, found in rows]
    print(write("overhead", device, {"per call": per, "single": singles, "parked": memory}))


if __name__ == "__main__":
    environment.prepare()
    parser = arguments(__doc__)
    parser.set_defaults(repeats=9)
    options = parser.parse_args()
    run(options.device, options.repeats)
