"""What a GPU shows: the tests that need one, then models of real shapes with random weights against plain diffusers.

    python -m benchmarks.gpu                          all parts, at most eight minutes on an H100
    python -m benchmarks.gpu --part tests --part sdxl some of them
    python -m benchmarks.gpu --device cpu --tiny      toy shapes, to see that the script itself works

On a machine with PyTorch and little else, `benchmarks/gpu-wheels.txt` names what is missing. Fetch it elsewhere with

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
        --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 -d wheels -r benchmarks/gpu-wheels.txt

and unpack it there with `pip install --no-index --no-deps --target site wheels/*.whl`, `PYTHONPATH=site:src`.

Every figure is a ratio over plain diffusers, whose pictures are drawn one after another in the same run, alternating.
Text encoders are left out: requests bring embeddings. Each part prints as it ends; `results/gpu-DEVICE.json` has all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_models
from benchmarks.figures import write
from benchmarks.gpu_models import SHAPES, Shape
from sfumato import gather
from sfumato.errors import told

ROOT = Path(__file__).parent.parent
TESTS = ("tests/test_gpu.py", "tests/test_low_memory.py", "tests/test_residency.py", "tests/test_context_parallel.py")
CONCURRENT = (1, 2, 4, 8, 16)
MATRIX = 8192
"""Side of the matrices whose product measures what the device can do."""


@dataclass
class Clock:
    """When to stop: what has not begun by then is left out, and named."""

    ends: float
    left_out: list[str] = field(default_factory=list)

    def allows(self, name: str) -> bool:
        if time.monotonic() < self.ends:
            return True
        self.left_out.append(name)
        return False


def synchronized(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(device: str, work: Callable[[], object]) -> float:
    synchronized(device)
    start = time.perf_counter()
    work()
    synchronized(device)
    return time.perf_counter() - start


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating point operations per second of a large matrix product, on random numbers."""
    side = MATRIX if device.startswith("cuda") else 512
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        one @ other
    times = [seconds(device, lambda: one @ other) for _ in range(10)]
    return 2 * side**3 / statistics.median(times)


# One shape.


class Bench:
    """One pipeline on the device, and the ways to draw with it."""

    def __init__(self, shape: Shape, device: str, repeats: int) -> None:
        self.shape = shape
        self.device = device
        self.repeats = repeats
        self.pipe = shape.build(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.denoiser = getattr(self.pipe, shape.denoiser)

    def plain(self, calls: Sequence[dict[str, Any]]) -> list[Any]:
        with torch.no_grad():
            return [self.pipe(**call).images[0] for call in calls]

    def together(self, calls: Sequence[dict[str, Any]]) -> list[Any]:
        return [output.images[0] for output in gather(self.pipe, calls, max_batch=32)]

    def calls(self, count: int) -> list[dict[str, Any]]:
        """Of different steps, guidance and seeds; each call has generators of its own."""
        return [self.shape.call(self.device, number) for number in range(count)]

    def rate(self, draw: Callable[[Sequence[dict[str, Any]]], object], count: int) -> float:
        """Denoising steps per second of `count` pictures."""
        calls = self.calls(count)
        return float(sum(call["num_inference_steps"] for call in calls)) / seconds(self.device, lambda: draw(calls))

    def compared(self, count: int, plain_count: int = 2) -> dict[str, float]:
        """Rate of `count` at once over one after another; alternating."""
        repeats = self.repeats if count <= 8 else 1
        ratios = [
            self.rate(self.together, count) / self.rate(self.plain, min(count, plain_count)) for _ in range(repeats)
        ]
        return {"over plain": round(statistics.median(ratios), 3), "least": round(min(ratios), 3)}

    def difference(self, draw: Callable[[Sequence[dict[str, Any]]], list[Any]], expected: list[Any]) -> float:
        """Peak signal-to-noise ratio of the worst picture, in dB."""
        worst = max(
            float(np.mean((np.asarray(one, dtype=np.float64) - other) ** 2))
            for one, other in zip(draw(self.calls(len(expected))), expected, strict=True)
        )
        return round(10 * float(np.log10(1 / max(worst, 1e-12))), 1)

    def operations(self) -> int:
        """Floating point operations of one picture's denoiser, per step."""
        from torch.utils.flop_counter import FlopCounterMode

        call = self.calls(1)[0]
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            self.pipe(**call)
        return int(counter.get_total_flops() / call["num_inference_steps"])


def synchronizations(bench: Bench, draw: Callable[[Sequence[dict[str, Any]]], object], count: int) -> float:
    """How often per picture and step the host waits for the device."""
    calls = bench.calls(count)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            draw(calls)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(each.message) for each in caught)
    where = Counter(f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message))
    print("    waits at", dict(where.most_common(6)), flush=True)
    steps: int = sum(call["num_inference_steps"] for call in calls)
    return round(waits / steps, 2)


@contextmanager
def compiled(bench: Bench) -> Iterator[None]:
    """diffusers' regional compilation of the denoiser, for shapes that change."""
    backend = "inductor" if bench.device.startswith("cuda") else "eager"
    bench.denoiser.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=backend)
    try:
        yield
    finally:
        for module in bench.denoiser.modules():
            module._compiled_call_impl = None
        torch.compiler.reset()


@contextmanager
def in_fp8(bench: Bench) -> Iterator[None]:
    """Weights and activations of the denoiser in fp8 (torchao), compiled. Not undone: the last variant."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(bench.denoiser, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    with compiled(bench):
        yield


@contextmanager
def cached(bench: Bench) -> Iterator[None]:
    """diffusers' first-block cache. With random weights the speed is the point, the picture is not."""
    from diffusers import FirstBlockCacheConfig

    bench.denoiser.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    try:
        yield
    finally:
        bench.denoiser.disable_cache()


@contextmanager
def channels_last(bench: Bench) -> Iterator[None]:
    modules = [module for module in (bench.pipe.vae, bench.denoiser) if any(p.dim() == 4 for p in module.parameters())]
    for module in modules:
        module.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for module in modules:
            module.to(memory_format=torch.contiguous_format)


VARIANTS: dict[str, Callable[[Bench], Any]] = {
    "channels_last": channels_last, "compile": compiled, "cache": cached, "fp8": in_fp8,
}  # fmt: skip


def measure(
    shape: Shape, device: str, repeats: int, clock: Clock, rate: float, concurrent: Sequence[int] = CONCURRENT
) -> dict[str, Any]:
    bench = Bench(shape, device, repeats)
    bench.plain(bench.calls(1))
    expected = [np.asarray(each, dtype=np.float64) for each in bench.plain(bench.calls(3))]
    found: dict[str, Any] = {"batched against solo, dB": bench.difference(bench.together, expected)}
    print(f"    batched against solo {found['batched against solo, dB']} dB", flush=True)
    if device.startswith("cuda"):
        found["waits per step"] = {
            "plain": synchronizations(bench, bench.plain, 1), "8 at once": synchronizations(bench, bench.together, 8)
        }  # fmt: skip
    plain = bench.rate(bench.plain, 1)
    found["plain, steps per second"] = round(plain, 2)
    found["plain, share of the matrix rate"] = round(plain * bench.operations() / rate, 3)
    print(
        f"    plain {plain:.2f} steps/s, {found['plain, share of the matrix rate']:.1%} of the matrix rate", flush=True
    )
    found["at once"] = {}
    bench.together(bench.calls(8))  # proofs, and the kernels that cuDNN chooses
    for count in concurrent:
        if clock.allows(f"{shape.name} x{count}"):
            found["at once"][count] = bench.compared(count)
            print(f"    {count:2} at once: {found['at once'][count]}", flush=True)
    found["variants"] = {}
    for name in shape.variants:
        if clock.allows(f"{shape.name} {name}"):
            found["variants"][name] = variant(bench, name, plain, expected)
            print(f"    {name}: {found['variants'][name]}", flush=True)
    return found


def variant(bench: Bench, name: str, plain: float, expected: list[Any]) -> dict[str, Any]:
    """Rates over plain eager diffusers of this run, alone and eight at once; or why it cannot be."""
    start = time.monotonic()
    try:
        with VARIANTS[name](bench):
            difference = bench.difference(bench.plain, expected[:1])
            ready = time.monotonic() - start
            bench.together(bench.calls(4))
            alone = bench.rate(bench.plain, 2) / plain
            eight = bench.rate(bench.together, 8) / plain
    except Exception as error:
        return {"not possible": told(error)}
    return {
        "alone over plain": round(alone, 3), "8 at once over plain": round(eight, 3),
        "against plain, dB": difference, "seconds to get ready": round(ready, 1),
    }  # fmt: skip


# The tests.


def run_tests(processes: int) -> dict[str, Any]:
    """The suite's tests that need a GPU, and what those of families recorded."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [file for file in TESTS if (ROOT / file).exists()]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *files, "-m", "gpu", "-n", str(processes), "-W", "ignore",
             "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}", "-o", "junit_family=xunit1"],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])},
            capture_output=True, text=True,
        )  # fmt: skip
        print(done.stdout[-6000:], done.stderr[-500:], flush=True)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    outcomes = Counter(
        next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed") for case in cases
    )
    families = {
        str(case.get("name")): {str(each.get("name")): each.get("value") for each in case.iter("property")}
        for case in cases
        if case.find("properties") is not None
    }
    skipped = Counter(str(each.get("message"))[:120] for case in cases for each in case.iter("skipped"))
    failed = [str(case.get("name")) for case in cases if case.find("failure") is not None]
    return {"outcomes": outcomes, "failed": failed, "skipped": skipped, "families": families}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes")
    parser.add_argument("--part", action="append", choices=["tests", *SHAPES], help="may be repeated; all by default")
    parser.add_argument("--concurrent", type=int, nargs="+", default=CONCURRENT)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--processes", type=int, default=8, help="of the tests")
    parser.add_argument("--limit-s", type=float, default=460, help="what has not begun by then is left out")
    options = parser.parse_args()
    clock = Clock(time.monotonic() + options.limit_s)
    parts = options.part or ["tests", *SHAPES]
    figures: dict[str, Any] = {}
    if "tests" in parts:
        figures["tests"] = run_tests(options.processes)
        print("tests", dict(figures["tests"]["outcomes"]), figures["tests"]["failed"], flush=True)
        write("gpu", options.device, figures)
    rate = matrix_rate(options.device, gpu_models.DTYPE)
    figures["matrix rate, TFLOP/s"] = round(rate / 1e12, 1)
    for name, shape in SHAPES.items():
        if name in parts and clock.allows(name):
            print(name, flush=True)
            chosen = shape.tiny() if options.tiny else shape
            figures[name] = measure(chosen, options.device, options.repeats, clock, rate, options.concurrent)
            figures["left out for lack of time"] = clock.left_out
            write("gpu", options.device, figures)
            if options.device.startswith("cuda"):
                torch.cuda.empty_cache()
    print(write("gpu", options.device, figures))


if __name__ == "__main__":
    main()
